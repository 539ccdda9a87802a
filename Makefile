# make demo   a tiny model and corpus, a fine-tune, the tables and a report: about seven minutes on two cores
# make test   the test suite
# Both set up a virtual environment in .venv first. Needs Python 3.11 or newer (PYTHON=... to choose one).

PYTHON ?= python3
SEED ?= 0
PRETRAINING_STEPS ?= 1000
TRAIN_SPEAKERS ?= 50
EPOCHS ?= 8

.PHONY: demo test

demo: .venv/installed
	@if [ -n "$$(ls out 2>/dev/null)" ] && ! grep -qs '"model": "tiny/model"' out/settings.json; then \
		echo "out/ holds something that is not the demo's: move it away first"; exit 2; fi
	rm -rf tiny/model tiny/corpus
	.venv/bin/python tiny.py --steps $(PRETRAINING_STEPS) --train-speakers $(TRAIN_SPEAKERS) --seed $(SEED)
	rm -rf out/log.jsonl out/epoch-* out/base out/checkpoints out/validation.jsonl out/curves.png \
		out/predictions.jsonl.part out/report.html out/settings.json
	.venv/bin/python train.py --model tiny/model --data tiny/corpus --rank 16 --alpha 32 --learning-rate 3e-3 \
		--batch-size 8 --accumulation 2 --epochs $(EPOCHS) --seed $(SEED)
	.venv/bin/python evaluate.py --adapter out/ --base --scoring greedy expected --report out/report.html
	.venv/bin/python evaluate.py --adapter out/ --audio tiny/corpus/$$(head -1 tiny/corpus/test/wav.scp | cut -f2) \
		--text "$$(head -1 tiny/corpus/test/text | cut -f2)"

test: .venv/installed
	.venv/bin/python -m pytest -q tests

.venv/installed: requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt -r tests/requirements.txt
	touch $@
