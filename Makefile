# The few commands that a person needs; CMake does the work. Everything here may be run again: what is done stays done.
PRESET ?= release
BUILD := $(if $(filter release,$(PRESET)),build,build-$(PRESET))
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: all setup configure build test check-format format demo bench check-cuda gpu asan tsan install clean

all: build

setup:
	@scripts/setup

# Binary: build/moend; the tests are built by `make test`. Kernels for NVIDIA GPUs are compiled in where a compiler for
# them is found; CUDA=0 leaves them out, CUDA=1 insists.
# GPU=1 builds ggml's CUDA back end, too (scripts/setup-gpu): layers run on GPUs then.
build: configure
	@cmake --build $(BUILD) -j $(JOBS) --target moend

# The compiler for GPUs that `gpu` may bring is there before CMake looks for one.
configure: setup $(if $(filter-out 0,$(GPU)),gpu)
	@[ -e $(BUILD)/build.ninja ] && [ -z "$(CUDA)$(GPU)" ] || \
	  cmake --preset $(PRESET) $(if $(CUDA),-DMOEND_CUDA=$(if $(filter 0,$(CUDA)),OFF,ON))

test: configure check-format
	@cmake --build $(BUILD) -j $(JOBS)
	@scripts/setup --tests || echo "going on; tests that lack a tool are skipped" >&2
	@ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

# Calibrates the reference model, solves for 14x, and asks eight questions about a text of 16,000 tokens.
demo: build
	@scripts/demo

check-format:
	@scripts/format --check
format:
	@scripts/format

# ggml's back end for NVIDIA GPUs, into .deps/backends.
gpu: setup
	@scripts/setup-gpu

# Micro-benchmarks (Google Benchmark).
bench: setup
	@cmake --preset release -DMOEND_BUILD_BENCH=ON >/dev/null
	@cmake --build build -j $(JOBS) --target attention_bench versus_ggml prefill_share moend
	@scripts/bench

# Everything that wants an NVIDIA GPU; writes cuda-report.txt.
check-cuda:
	@scripts/check-cuda

asan tsan:
	@$(MAKE) test PRESET=$(if $(filter asan,$@),asan-ubsan,tsan)

# make install PREFIX=/usr/local
PREFIX ?= /usr/local
install: build
	@cmake --install $(BUILD) --prefix $(PREFIX)

clean:
	@rm -rf build build-debug build-asan-ubsan build-tsan build-libfuzzer demo-out
