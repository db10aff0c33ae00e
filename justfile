# The same commands as CI.

default: lint test

test *args:
    pytest {{args}}

lint:
    ruff check .
    ruff format --check .
    mypy

fix:
    ruff check --fix .
    ruff format .

demo *args:
    cmrm demo {{args}}

# The peers in it are measured where they are installed: pip install --no-deps repeng==0.4.0 steering-vectors==0.12.2
bench *args:
    python benchmarks/run.py {{args}}

ci:
    bash .ci/run
