"""HTTP only: bytes from clients in, bytes to clients out. No torch, no model; the engine is seen as submit and abort.

body (bytes -> schema structs) -> params, structured (wire -> SamplingParams) -> service.prompts (messages -> Prompt)
-> service.engine.submit (Prompt -> Generation) -> chat | completions | generate (deltas -> replies)
-> sse (the only framer)
middleware turns every exception into OpenAI's error body; app wires routes, start, drain and signals;
admin answers about the server itself. A new endpoint is a module with `routes(context)` and a line in app.
"""
