"""What vLLM loads by the entry point `vllm.general_plugins`, in every one of its processes.

It arms a model only where `CMRM_SHIFT` names an artifact, or cmrm's own engine asks for it. This
module imports nothing: vLLM goes on without a plugin that cannot be imported, and an error raised
by `register` stops it.
"""


def register() -> None:
    """Arm vLLM with the artifact in `CMRM_SHIFT`, under the setting in `CMRM_STEERING` (JSON).

    With `CMRM_PROGRAMS` instead, programs come while vLLM runs (`engines.vllm.engine`). Nothing is
    done where neither is set.

    Raises:
        InputError, ArtifactError: vLLM's version is not tested, or the artifact cannot be used.
    """
    import os

    if os.environ.get("CMRM_SHIFT") or os.environ.get("CMRM_PROGRAMS"):
        from cmrm.engines.vllm.arming import arm_vllm

        arm_vllm()
