# `make serve`, `make test`, `make demo`. Each builds the environment that it needs.
PYTHON ?= python3
# cpu, or gpu on a machine with NVIDIA's driver: `make serve RUNTIME=gpu` also installs CUDA's libraries, as the image does
RUNTIME ?= cpu
CUDA_gpu = 'onnxruntime-gpu[cuda,cudnn]'
PROVIDER_gpu = VITRINE_PROVIDER=$${VITRINE_PROVIDER:-cuda}
PORT ?= 3000
# `make serve CLIP=ViT-B-32/openai`: an open_clip CLIP, NAME/TAG or hf-hub:ORG/MODEL, exported once. IMAGES: a folder on
# which int8 must agree with float32, else there is no int8; LABELS: a file with one label per line, else ImageNet's classes.
CLIP ?=
IMAGES ?=
LABELS ?=
# Data root of `make demo`: torchvision downloads CIFAR-10 to it, unless it has class folders cifar10/{train,val}/<class>/.
DATA ?= data
RUN ?= runs/demo
# For `make loadtest`: LOAD of loadtests/profiles.py, requests per second, and classify, attribute, batch, mixed or paired.
LOAD ?= steady
RATE ?= 20
MIX ?= attribute

PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PHOTO = build/cat.png
VITRINE = .venv-dev/bin/vitrine

# hf-hub:ORG/MODEL has no tag.
ON_HUB = $(filter hf-hub:%,$(CLIP))
CLIP_NAME = $(or $(ON_HUB),$(firstword $(subst /, ,$(CLIP))))
CLIP_TAG = $(if $(ON_HUB),,$(word 2,$(subst /, ,$(CLIP))))
CLIP_BUNDLE = build/clip/$(subst :,-,$(subst /,-,$(CLIP)))

.PHONY: announce clip-bundle help serve test test-image audit demo loadtest clean

help:
	@echo "make serve   the service on the embedded bundle, http://127.0.0.1:$(PORT)  (light environment, no torch)"
	@echo "make serve CLIP=ViT-B-32/openai   the same with an unmodified open_clip CLIP  (needs the full environment once)"
	@echo "make test    ruff, mypy, pytest  (full environment: torch and open_clip, about 5 GB)"
	@echo "make test-image  run the Dockerfile's steps in a clean Debian root (as root; needs debootstrap, 5 minutes)"
	@echo "make loadtest  simulated users on a separate service, and a report: LOAD=step RATE=150 MIX=attribute"
	@echo "make audit   check the pinned versions against the public list of vulnerabilities"
	@echo "make demo    build the embedded bundle again, from CIFAR-10 only: takes hours; if interrupted, run it again to resume"
	@echo "             (DATA=$(DATA): folder for CIFAR-10 and the CLIP; RUN=$(RUN): the CLT's run, next to it that of the SAEs)"
	@echo "make clean   remove both environments and build/"

serve: $(if $(CLIP),announce) .venv/installed $(PHOTO) $(if $(CLIP),clip-bundle)
	@echo
	@echo "In another terminal, with this photo or one of yours:"
	@echo
	@echo "  curl --retry 9 --retry-connrefused -F image=@$(PHOTO) http://127.0.0.1:$(PORT)/v1/attribute"
	@echo
	@$(PROVIDER_$(RUNTIME)) VITRINE_LOG_FORMAT=$${VITRINE_LOG_FORMAT:-text} .venv/bin/vitrine serve --port $(PORT) $(if $(CLIP),--bundle $(CLIP_BUNDLE))

announce:
	@test -e $(CLIP_BUNDLE) || { \
	  echo "Once: the full environment (about 5 GB) is installed, and the weights of $(CLIP) are downloaded and exported to $(CLIP_BUNDLE)."; \
	  echo "ViT-B-32: 0.6 GB of weights, a bundle of the same size, and 5 minutes on two cores, not counting the download of the weights."; \
	  echo "If it is interrupted, run it again to continue."; }

# A bundle exists completely or not at all. Downloads are in the hub's cache.
clip-bundle: $(if $(wildcard $(CLIP_BUNDLE)),,.venv-dev/installed)
	@if [ -e $(CLIP_BUNDLE) ]; then echo "$(CLIP_BUNDLE) exists and is served unchanged; remove it to export it again"; \
	else mkdir -p build/clip && $(VITRINE) export --clip $(CLIP_NAME) $(if $(CLIP_TAG),--weights $(CLIP_TAG)) \
	  $(if $(IMAGES),--images $(IMAGES)) $(if $(LABELS),--labels-file $(LABELS)) --out $(CLIP_BUNDLE); fi

# A process a core, four at most (each needs 2 GB): tests compute on one thread. A file's tests stay together, for their
# fixtures' sake. The documents' requests are of the photo.
test: .venv/installed .venv-dev/installed $(PHOTO)
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy
	VITRINE_LIGHT_PYTHON=$(CURDIR)/.venv/bin/python .venv-dev/bin/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# As root, with Debian's debootstrap: deploy/Dockerfile's steps in a clean root, and the service in it.
test-image: .venv-dev/installed
	VITRINE_REQUIRE_CHROOT=1 .venv-dev/bin/pytest tests/deploy/test_dockerfile.py

# Rows and report: build/loadtest. More: .venv-dev/bin/python loadtests/latency.py --help
loadtest: .venv-dev/installed
	.venv-dev/bin/python loadtests/latency.py --load $(LOAD) --rate $(RATE) --mix $(MIX)

# Known vulnerabilities of the pinned versions; build/audit.json lists what was audited, if the public list was reached.
audit: .venv-dev/installed
	@mkdir -p build
	.venv-dev/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --format json --output build/audit.json

# Pretraining and training resume what they find, and do nothing if they are complete. The new bundle is made next to the
# old one, which is moved away (to build/demo-before) only once the new one is verified.
# An edit is valid only for the graphs that it was made for: make models/demo/edits again (training/RESULTS.md).
demo: .venv-dev/installed
	$(VITRINE) pretrain --recipe training/recipes/clip/demo.toml --data-root $(DATA) --out $(DATA)/demo-clip
	$(VITRINE) train --recipe demo --data-root $(DATA) --out $(RUN)
	test $(RUN)/evaluation/results.json -nt $(RUN)/log.jsonl || \
	  $(VITRINE) evaluate --checkpoint $(RUN) --data-root $(DATA) --out $(RUN)/evaluation
	$(VITRINE) train --recipe demo-residual --data-root $(DATA) --out $(RUN)-residual
	rm -rf build/demo-plain build/demo-clt build/demo
	$(VITRINE) export --checkpoint $(RUN) --residual $(RUN)-residual --data-root $(DATA) --out build/demo-plain
	$(VITRINE) cards --checkpoint $(RUN) --bundle build/demo-plain --data-root $(DATA) --out build/demo-clt \
	  --vocabulary training/vocabularies/demo.txt --pictures means
	$(VITRINE) cards --checkpoint $(RUN)-residual --bundle build/demo-clt --data-root $(DATA) --out build/demo \
	  --vocabulary training/vocabularies/demo.txt --pictures means
	$(VITRINE) verify build/demo
	if cmp -s build/demo/manifest.json models/demo/manifest.json; then echo "models/demo is already this bundle"; else \
	  rm -rf build/demo-before && \
	  if [ -d models/demo ]; then mv models/demo build/demo-before; fi && \
	  mv build/demo models/demo; fi

# The service's environment: no torch.
.venv/installed: pyproject.toml constraints.txt vitrine/__main__.py
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --editable '.[$(RUNTIME)]' $(CUDA_$(RUNTIME))
	@touch $@

# Training, export and tests: everything.
.venv-dev/installed: pyproject.toml constraints.txt vitrine/__main__.py
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/python $(PIP) --editable '.[cpu,training,dev]'
	@touch $@

# "Chelsea", a photo of a cat by Stefan van der Walt, CC0, as scikit-image ships it in its wheel.
$(PHOTO): .venv/installed
	@mkdir -p build
	.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	  --constraint constraints.txt --dest build scikit-image
	.venv/bin/python -c "import glob, zipfile; \
	  wheel = zipfile.ZipFile(glob.glob('build/scikit_image-*.whl')[0]); \
	  open('$@', 'wb').write(wheel.read('skimage/data/chelsea.png'))"
	@rm -f build/scikit_image-*.whl

clean:
	rm -rf .venv .venv-dev build
