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

bench *args:
    python benchmarks/run.py {{args}}

ci:
    bash .ci/run
