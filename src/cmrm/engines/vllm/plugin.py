"""What vLLM loads by the entry point `vllm.general_plugins`, in every one of its processes.

It arms a model only where `CMRM_SHIFT` names an artifact. This module imports nothing: vLLM goes on
without a plugin that cannot be imported, and an error raised by `register` stops it.
"""


def register() -> None:
    """Arm vLLM with the artifact in `CMRM_SHIFT`, under the setting in `CMRM_STEERING` (JSON).

    Nothing is done where `CMRM_SHIFT` is not set.

    Raises:
        InputError, ArtifactError: vLLM's version is not tested, or the artifact cannot be used.
    """
    import os

    if os.environ.get("CMRM_SHIFT"):
        from cmrm.engines.vllm.arming import arm_vllm

        arm_vllm()
