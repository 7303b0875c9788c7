# make demo   train, test, predict and check a submission on the embedded set
# make test   the quick tests, shared by JOBS processes: `make test JOBS=4`
# make kaggle-image  Kaggle's image, nearly (3 GB), and the script that train.py pushes there run in it
# make soak   runs killed at a hundred places, and 50,000 steps: an hour or two, not part of check
# make check  all that .ci/run does: tests, lint, types, slow tests, tests on real data
PYTHON ?= python3
PYTHON312 ?= python3.12
JOBS ?= 2
BIN := .venv/bin
# what pip only warns of is nothing that a user of this project can act on
PIP := -m pip install -qq --progress-bar off
NAME := $(shell date +%Y-%m-%d_%H-%M-%S)
RUN := runs/demo/$(NAME)
# core/starting.py says why
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 20000
endif

IMAGE := .kaggle

.PHONY: demo test check soak kaggle-image
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python train.py fit --config configs/demo.yaml --run $(NAME)
	$(BIN)/python train.py test --run $(RUN)
	@$(BIN)/python -c "from datamodules import DemoDataModule; \
	  from benchmarks.results import svm_baseline; \
	  print(f'test accuracy of an SVM on the same pixels: {svm_baseline(DemoDataModule()):.4f}')"
	$(BIN)/python predict.py $(RUN)
	$(BIN)/python submit.py $(RUN) --dry_run
	@$(BIN)/python study.py page $(RUN) > /dev/null
	@echo
	@echo "The picture:        $(RUN)/learning_curves.png"
	@echo "Everything:         $(RUN)/page.html"
	@echo "Next, on CIFAR-10:  $(BIN)/python train.py fit --config configs/cifar10_cpu.yaml --data.download=true"

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

kaggle-image: .venv/installed-dev $(IMAGE)/wheels
	KAGGLE_IMAGE=$(IMAGE) KAGGLE_WHEELS=$(IMAGE)/wheels \
	  $(BIN)/python -m pytest tests/test_kaggle_kernel.py -m slow -k runs_as_it_is

$(IMAGE)/wheels: tests/kaggle_image.txt requirements.txt
	$(PYTHON312) -m venv --clear $(IMAGE)
	$(IMAGE)/bin/python -m pip install --quiet --no-compile --progress-bar off -r tests/kaggle_image.txt
	$(IMAGE)/bin/python -m pip install --quiet --dry-run --report $(IMAGE)/lacking.json -r requirements.txt
	$(IMAGE)/bin/python -c "import json; print(*(f'{x[\"metadata\"][\"name\"]}=={x[\"metadata\"][\"version\"]}' \
	  for x in json.load(open('$(IMAGE)/lacking.json'))['install']), sep='\n')" > $(IMAGE)/lacking.txt
	$(IMAGE)/bin/python -m pip download --quiet --no-deps -d $@ -r $(IMAGE)/lacking.txt

check: .venv/installed-dev
	.ci/run

soak: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python $(PIP) -r requirements-dev.txt
	touch $@
