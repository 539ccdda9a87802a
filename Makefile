# make demo    a tiny model and corpus, a fine-tune, the tables, a report: about four minutes on two idle cores
# make test    the fast tests
# make check   lint, format and all tests; what .ci/run calls
# Each sets up a virtual environment in .venv first. Needs Python 3.11 or newer (PYTHON=... to choose one).

PYTHON ?= python3
SEED ?= 0
PRETRAINING_STEPS ?= 1000
TRAIN_SPEAKERS ?= 50
EPOCHS ?= 4
PYTEST := .venv/bin/python -m pytest -q -n 2 --dist loadfile tests
# The models are so small that a second thread in a process costs more than it brings
export OMP_NUM_THREADS := 1

.PHONY: demo test check

demo: .venv/installed
	@if [ -n "$$(ls out 2>/dev/null)" ] && ! grep -qs '"model": "tiny/model"' out/settings.json; then \
		echo "out/ holds something that is not the demo's: move it away first"; exit 2; fi
	rm -rf tiny/model tiny/corpus
	.venv/bin/python tiny.py --steps $(PRETRAINING_STEPS) --train-speakers $(TRAIN_SPEAKERS) --seed $(SEED)
	rm -rf out/log.jsonl out/epoch-* out/base out/checkpoints out/curves.png \
		out/predictions.* out/metrics.json out/figure5.png out/report.html out/results.png out/scores.png out/confusion.png \
		out/settings.json
	.venv/bin/python train.py --model tiny/model --data tiny/corpus --rank 16 --alpha 32 --dropout 0 --learning-rate 3e-3 \
		--batch-size 8 --accumulation 1 --epochs $(EPOCHS) --seed $(SEED)
	.venv/bin/python evaluate.py --adapter out/ --base --scoring greedy expected --max-new-tokens 80
	.venv/bin/python -m analysis.report out/
	rm -f tiny/pronunciations.txt
	.venv/bin/python -m analysis.pronunciations tiny/corpus --output tiny/pronunciations.txt
	@command -v ffmpeg > /dev/null || { echo "ffmpeg is not installed: no recording of one's own is shown"; exit 0; }; \
	.venv/bin/python -m analysis.listen tiny/corpus/$$(head -1 tiny/corpus/test/wav.scp | cut -f2) --adapter out/ \
		--text "$$(.venv/bin/python -c 'from pathlib import Path; import data; \
			print(data.read_corpus(Path("tiny/corpus"), "test", 1)[0].text)')" --pronunciations tiny/pronunciations.txt

test: .venv/installed
	$(PYTEST) -m "not slow"

check: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	$(PYTEST)

.venv/installed: requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt -r tests/requirements.txt
	touch $@
