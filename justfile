# The same commands as CI.

default: lint test

test *args:
    pytest {{args}}

lint:
    ruff check .
    ruff format --check .
    lint-imports
    mypy

fix:
    ruff check --fix .
    ruff format .

# The JSON schema in docs is made of the classes.
schema:
    python -m cmrm.measure.schema > docs/results-schema.json

demo *args:
    cmrm demo {{args}}

# 10^5 random tables, images and artifacts; the tests run 10^4.
fuzz:
    CMRM_FUZZ=100000 pytest tests/prompts/test_fuzz_inputs.py tests/shift/test_artifact.py

# The peers in it are measured where they are installed: pip install --no-deps repeng==0.4.0 steering-vectors==0.12.2
bench *args:
    python benchmarks/run.py {{args}}

ci:
    bash .ci/run
