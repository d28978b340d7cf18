"""The stub: a small HTTP server on loopback that plays OpenAI.

It is a process of its own, started by `helpers.connect()` or by hand with
`python -m llm_stub --port 8000`. Notebooks and tests speak HTTP with it.
"""
