"""The contract that capture and steering rest on, as code that runs on any checkpoint (`cmrm check
MODEL`)."""
