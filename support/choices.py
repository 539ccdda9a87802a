"""Choices: what the settings of several scripts may say of a model, and the model that they mean by default."""

from typing import Annotated, Literal

from pydantic import Field

HUB_MODEL = "microsoft/Phi-4-multimodal-instruct"
HUB_MODEL_REVISION = "refs/pr/70"  # the checkpoint in the format of transformers' own classes; never merged into main

Strategy = Literal["lora", "unfreeze"]  # model.STRATEGIES says what trains
SpeechAdapter = Literal["merge", "continue", "none"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Dtype = Literal["float32", "bfloat16"]
Rank = Annotated[int, Field(ge=1, le=3072)]  # the width of the real model: no matrix of it has a higher rank
Quantize = Literal["nf4"]
