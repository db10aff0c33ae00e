"""The demo VLM (a real LLaVA on SmolLM2-135M-Instruct, assembled offline) and its measurement."""

DEMO = "demo"
"""Name under which the demo VLM is asked for; it is assembled on first use."""
