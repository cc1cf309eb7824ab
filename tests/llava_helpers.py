"""The oracle of LLaVA checkpoints for tests/parity_helpers.py: HF's twin, its tokenizer and PIL-backed processor, and
prompts as facts about the chat templates say, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parity_helpers import Part, inputs_for, noise_image
from tiny_llava import Row, Twin, tiny_llava

Turns = list[tuple[str, list[Part]]]
LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


class LlavaOracle:
    """As `parity_helpers.Oracle`."""

    def __init__(self, row: Row, parent: Path, **sizes: Any) -> None:
        """`sizes`: of `tiny_llava`."""
        self.twin: Twin = tiny_llava(parent, row, **sizes)
        self.name, self.folder = row.name, self.twin.folder
        self.model = self.twin.model
        self.image_token_id = self.twin.model.config.image_token_index

    def prepare(self, turns: Turns) -> tuple[list[int], dict[str, Any]]:
        images = [noise_image(*part) for _, parts in turns for part in parts if not isinstance(part, str)]
        extra = self.process(images) if images else {}
        text = self._render(turns)
        if images:
            for features in self.features(extra):
                text = text.replace("<image>", "<slot>" * len(features), 1)
        ids = self.twin.tokenizer.encode(text.replace("<slot>", "<image>"))
        named, used = self.twin.tokenizer.convert_tokens_to_ids("<image>"), self.twin.model.config.image_token_index
        return [used if token_id == named else token_id for token_id in ids], extra

    def process(self, images: list[Any]) -> dict[str, Any]:
        """The images of one prompt: a nested list tells OneVision's processor so."""
        nested = [images] if self.twin.row.twin == "onevision" else images
        inputs = dict(self.twin.processor(nested, return_tensors="pt"))
        if "batch_num_images" in inputs:
            inputs["batch_num_images"] = torch.as_tensor(inputs["batch_num_images"])
        return inputs

    @torch.no_grad()
    def features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Per image (tokens, hidden)."""
        return list(self.twin.model.model.get_image_features(**inputs, return_dict=True).pooler_output)

    @torch.no_grad()
    def logprobs(
        self, prompt_ids: list[int], output_ids: list[int], extra: dict[str, Any], model: Any = None
    ) -> torch.Tensor:
        model = self.twin.model if model is None else model
        ids = torch.tensor([prompt_ids + output_ids])
        inputs = inputs_for(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra})
        logits = model(**inputs, use_cache=False).logits
        return logits[0, len(prompt_ids) - 1 : -1, : self.twin.num_logits].float().log_softmax(-1).cpu()

    def _render(self, turns: Turns) -> str:
        """No BOS: the tokenizers of the families with one put it there."""
        name = self.twin.row.template
        if name == "the model's own":
            kinds = [
                (
                    role,
                    [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts],
                )
                for role, parts in turns
            ]
            chat = [{"role": role, "content": content} for role, content in kinds]
            rendered = self.twin.tokenizer.apply_chat_template(
                chat, chat_template=self.twin.row.own_template, tokenize=False, add_generation_prompt=True
            )
            return str(rendered)
        system = next(("".join(map(str, parts)) for role, parts in turns if role == "system"), None)
        talk = [
            (role, "".join(part if isinstance(part, str) else "<image>\n" for part in parts))
            for role, parts in turns
            if role != "system"
        ]
        if name == "vicuna_v1.1":
            start = VICUNA_SYSTEM if system is None else system
            said = [f"USER: {text} " if role == "user" else f"ASSISTANT: {text}</s>" for role, text in talk]
            return f"{start} {''.join(said)}ASSISTANT:"
        if name == "mistral-llava":
            first = f"{system}\n\n" if system else ""
            said = [f"[INST] {text} [/INST]" if role == "user" else f" {text}</s>" for role, text in talk]
            return said[0].replace("[INST] ", f"[INST] {first}", 1) + "".join(said[1:])
        if name == "llava_llama_3":
            blocks = [("system", LLAMA_SYSTEM if system is None else system), *talk]
            said = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>" for role, text in blocks]
            return "".join(said) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
        assert name == "chatml-llava"
        blocks = [("system", "You are a helpful assistant." if system is None else system), *talk]
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in blocks) + "<|im_start|>assistant\n"
