"""The provider: a small HTTP server on loopback that plays OpenAI.

A process of its own, started by `helpers.connect()` or by hand with
`python -m llm_stub --port 8000`. It shares no code with the notebook
side: the two speak HTTP.
"""
