# Ferry's everyday commands. `make test` and `make demo` install what they need with apt-get when it is missing (as root).

CARGO ?= cargo
PREFIX ?= /usr/local
# The profile that `make demo` builds and shows: dev, which the tests build too, or release.
PROFILE ?= dev
TARGET := $(or $(CARGO_TARGET_DIR),target)
FERRY = $(TARGET)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/ferry
SHARE = $(DESTDIR)$(PREFIX)/share

.PHONY: all demo test check torture bench install packages-build packages-test

all: packages-build
	$(CARGO) build --release -p ferry

demo: packages-build
	$(CARGO) build --profile $(PROFILE) -p ferry
	test-bundles/demo.sh $(FERRY)

# nextest runs each test in a process of its own, with a time limit; the container tests need both.
test: packages-test
	$(CARGO) build --workspace --all-targets
	$(CARGO) nextest run --workspace
	$(CARGO) test --workspace --doc

# Module documentation is for those who change the code, so it may name what is private.
check: packages-build
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps
	$(CARGO) test -p ferry-test-bundles --test source

# Dumps, then restores, that are killed at random instants. TORTURE_SEED=N repeats a run; TORTURE_WHOM=worker kills the process that does the work.
torture: packages-test
	$(CARGO) build --release -p ferry -p ferry-test-bundles
	FERRY_TORTURE=$(or $(TORTURE),2000) FERRY_TORTURE_SEED=$(TORTURE_SEED) FERRY_TORTURE_WHOM=$(TORTURE_WHOM) \
		$(CARGO) test --release -p ferry-test-bundles --test faults -- --exact torture
	FERRY_TORTURE_RESTORES=$(or $(TORTURE_RESTORES),200) FERRY_TORTURE_SEED=$(TORTURE_SEED) \
		$(CARGO) test --release -p ferry-test-bundles --test all_or_nothing -- torture::

bench: packages-test
	$(CARGO) build --release -p ferry -p ferry-test-bundles
	$(CARGO) bench -p ferry-test-bundles --bench round_trip

# Two names for one program: called as `criu` it speaks CRIU's command line. The program itself writes what its man pages and
# completions say.
install: PROFILE = release
install: packages-build
	$(CARGO) build --profile $(PROFILE) -p ferry
	install -D -m 755 $(FERRY) $(DESTDIR)$(PREFIX)/bin/ferry
	ln -sf ferry $(DESTDIR)$(PREFIX)/bin/criu
	env -u XDG_RUNTIME_DIR $(FERRY) generate man $(SHARE)/man/man8
	env -u XDG_RUNTIME_DIR $(FERRY) generate completions $(SHARE)

packages-build:
	.ci/packages build

packages-test: packages-build
	.ci/packages test
