# `make demo` and `make test` do all their own set-up. `make help` lists the rest.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-aot test-ray test-clients bench lint oracle protos clean install

VENV ?= .venv
PY := $(VENV)/bin/python
ORACLE := .venv-oracle
PROTOS := .venv-protos
PIP := -m pip --disable-pip-version-check --no-input install -qq --constraint constraints.txt
PYTEST_ARGS ?=
# A test that hangs or a worker that crashes ends the run with its stack, where xdist would wait for ever.
PYTEST_ENDS := --max-worker-restart=0 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
BENCH_ARGS ?=
ORACLE_ARGS ?=

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.core  ## serve real prompts with the model inside the package
	@$(VENV)/bin/sparsejax demo

test: $(VENV)/.test  ## all quick tests
	@$(PY) -m pytest -m "not slow and not aot and not ray and not clients" -n 2 --dist loadfile $(PYTEST_ENDS) $(PYTEST_ARGS)

test-slow: $(VENV)/.test  ## the long sweeps
	@XLA_FLAGS= $(PY) -m pytest -m slow $(PYTEST_ARGS)

test-aot: $(VENV)/.aot  ## compile the kernels for GPU and TPU without owning either (large download)
	@$(PY) -m pytest -m aot $(PYTEST_ARGS)

test-ray: $(VENV)/.ray  ## replicas on a real Ray cluster of this machine
	@$(PY) -m pytest -m ray $(PYTEST_ARGS)

test-clients: $(VENV)/.clients  ## other people's clients against the servers: LangChain, LiteLLM, lm-eval, smg
	@$(PY) -m pytest -m clients $(PYTEST_ARGS)

bench: $(VENV)/.core  ## the serving benchmark; also against transformers once `make oracle` has run
	@$(PY) scripts/bench.py serve $(if $(wildcard $(ORACLE)/.stamp),--peer transformers) $(BENCH_ARGS)

lint: $(VENV)/.test  ## ruff
	@$(PY) -m ruff check .

oracle: $(ORACLE)/.stamp $(VENV)/.test  ## compare whole models live against transformers with torch (large download)
	@$(PY) scripts/oracle.py --python $(ORACLE)/bin/python $(ORACLE_ARGS)

# The oldest compiler that the runtime's range allows: what it writes loads with every newer protobuf.
protos: $(PY)  ## generate the modules of the gRPC messages from their .proto files
	@$(PY) -m venv $(PROTOS)
	@$(PROTOS)/bin/python -m pip --disable-pip-version-check --no-input install -qq 'grpcio-tools==1.78.*'
	@$(PROTOS)/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		sparsejax/serve/grpc/protos/*.proto

install: $(VENV)/.core  ## only create the environment in .venv

clean:  ## remove the environments, caches and build outputs
	rm -rf $(VENV) $(ORACLE) $(PROTOS) .cache .pytest_cache .hypothesis .ruff_cache build dist *.egg-info

$(PY):
	@python=$$(sh scripts/find_python.sh) || exit 1; \
	echo "Creating $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)

# Each stamp is one set of packages; a changed pyproject or constraints file installs again.
$(VENV)/.core: pyproject.toml constraints.txt | $(PY)
	@echo "Installing sparsejax and its dependencies into $(VENV) (about 1 GB, first time only)"
	@$(PY) $(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(PY)
	@echo "Installing sparsejax with its test tools into $(VENV) (about 1 GB, first time only)"
	@$(PY) $(PIP) --editable ".[test]"
	@touch $(VENV)/.core $@

$(VENV)/.aot: $(VENV)/.test
	@echo "Installing the GPU and TPU compilers into $(VENV) (several GB, first time only)"
	@$(PY) $(PIP) --editable ".[test,aot]"
	@touch $@

$(VENV)/.ray $(VENV)/.clients: $(VENV)/.%: $(VENV)/.test
	@echo "Installing the packages of the extra $* into $(VENV) (hundreds of MB, first time only)"
	@$(PY) $(PIP) --editable ".[test,$*]"
	@touch $@

$(ORACLE)/.stamp: scripts/oracle_requirements.txt
	@python=$$(OLDEST=3.10 WANT="3.11 3.12 3.10 3.13" sh scripts/find_python.sh) || exit 1; \
	echo "Creating $(ORACLE) with $$python (torch and transformers, first time only)"; \
	"$$python" -m venv --clear $(ORACLE)
	@$(ORACLE)/bin/python -m pip --disable-pip-version-check --no-input install -qq -r scripts/oracle_requirements.txt
	@touch $@
