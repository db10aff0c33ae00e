"""The demo VLM: a real LLaVA on SmolLM2-135M-Instruct, assembled offline, and the loop that measures it."""

from cmrm.model.compat import mend_torchvision

mend_torchvision()

DEMO = "demo"
"""Where a model is asked for by name: the demo VLM, assembled on first use."""
