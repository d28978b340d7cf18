"""The stub: a small HTTP server on loopback that imitates OpenAI's API.

It runs as a separate process, started by `helpers.connect()` or by hand with
`python -m llm_stub --port 8000`. Notebooks and tests talk to it over HTTP.
"""
