"""Segments to token ids, and ids to text: the checkpoint's own tokenizer behind a wall between control and client text.

Used by build.py, the templates and the detokenizer. All methods may be called from any thread: nothing is switched
over per call. Knows nothing of messages or images."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lightvl.errors import BadRequest, ConfigError
from lightvl.prompt.template import ClientText, ImageSlot, Segment
from lightvl.prompt.vocabulary import Vocabulary

DEFAULT_IMAGE_TOKEN = "<image>"  # where a checkpoint's tokenizer has no image token, as in original LLaVA ones
_PARALLEL_CHARS = 2048  # from here on worth the call that lets other threads run meanwhile


IntArray = np.ndarray[Any, np.dtype[np.int64]]


class Tokenizer:
    """Encodes a whole prompt as one string, as HF would, so that ids equal HF's on clean text in every detail.

    Its backend takes no special token from text. In its place each one has an alias, a name that is drawn at random
    when the server starts: control strings are written with aliases before encoding.
    """

    def __init__(self, hf: Any, *, image_token_id: int | None = None, own_chat_template: str | None = None) -> None:
        """`hf`: a fast tokenizer of transformers, whose backend is taken over and changed. `image_token_id`: the
        family's, within the tokenizer or not."""
        backend = getattr(hf, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise ConfigError("the checkpoint's tokenizer has no fast form (tokenizer.json or tokenizer.model)")
        self.own_chat_template = own_chat_template
        self.bos_token_id: int | None = hf.bos_token_id
        self.eos_token_id: int | None = hf.eos_token_id
        self.special_tokens: dict[str, str] = {
            name: str(token) for name, token in hf.special_tokens_map.items() if isinstance(token, str | AddedToken)
        }
        self.adds_bos = self.bos_token_id is not None and hf.encode("a")[:1] == [self.bos_token_id]

        image_token = None if image_token_id is None else backend.id_to_token(image_token_id)
        backend = _with_special(backend, image_token)
        self.vocabulary = Vocabulary.of(backend)
        added = backend.get_added_tokens_decoder()
        special = {token.content: token for token in added.values() if token.special}
        self._control_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        if image_token_id is not None and image_token is None:
            image_token = DEFAULT_IMAGE_TOKEN
            self._control_ids[image_token] = image_token_id
        self.image_token = image_token
        self.control_tokens = tuple(self._control_ids)
        self.control_pattern = _any_of(self._control_ids)
        self._added_pattern = _any_of({*self._control_ids, *(token.content for token in added.values())})

        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._aliases = self._add_aliases(special)
        self._real_ids = self._make_real_ids(getattr(backend.model, "unk_token", None) or hf.unk_token)

    @classmethod
    def load(cls, path: str, *, image_token_id: int | None = None) -> Tokenizer:
        """From a checkpoint folder or hub id. Raises ConfigError."""
        try:
            hf = _load_hf(path)
        except Exception as error:  # transformers raises nearly anything on a broken folder
            raise ConfigError(f"{path}: its tokenizer cannot be loaded: {_first_line(error)}") from None
        return cls(hf, image_token_id=image_token_id, own_chat_template=_own_chat_template(path, hf))

    def __len__(self) -> int:
        """One more than the largest id."""
        return len(self.vocabulary.token_bytes)

    def control_id(self, text: str) -> int | None:
        """The id of `text` if it is one special token."""
        return self._control_ids.get(text)

    def encode(self, segments: Iterable[Segment], *, bos: bool = False) -> list[int]:
        """Ids of all segments as one text; each ImageSlot becomes the image token's id. With `bos`, or if the tokenizer
        puts one there itself, BOS starts the prompt; there is never more than one. Raises BadRequest."""
        text = "".join(map(self._written_with_aliases, segments))
        coded = np.asarray(self._encode_text(text), dtype=np.int64)
        real = self._real_ids[coded]
        ids: list[int] = self._respell(real, coded) if (real < 0).any() else real.tolist()
        if self.bos_token_id is None:
            return ids
        num_bos = next((i for i, token_id in enumerate(ids) if token_id != self.bos_token_id), len(ids))
        if num_bos > 1 or (num_bos == 0 and (bos or self.adds_bos)):
            return [self.bos_token_id, *ids[num_bos:]]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """All at once; ids beyond the tokenizer spell nothing."""
        known = [token_id for token_id in ids if token_id < len(self)]  # beyond these are the aliases
        return self._backend.decode(known, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells; a token of half a character spells that half."""
        spelled = self.vocabulary.token_bytes
        return spelled[token_id] if 0 <= token_id < len(spelled) else b""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _written_with_aliases(self, segment: Segment) -> str:
        if isinstance(segment, ClientText):
            return segment.text
        if isinstance(segment, ImageSlot):
            assert self.image_token is not None, "an image slot, but the family has no image token"
            return self._aliases[self.image_token]
        return self._added_pattern.sub(lambda match: self._aliases.get(match[0], match[0]), segment.text)

    def _encode_text(self, text: str) -> list[int]:
        try:
            if len(text) < _PARALLEL_CHARS:
                return self._backend.encode(text, add_special_tokens=False).ids
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError):  # lone surrogates
            raise BadRequest("the text is not valid Unicode", param="messages") from None

    def _add_aliases(self, special: dict[str, AddedToken]) -> dict[str, str]:
        nonce = secrets.token_hex(8)
        aliases: dict[str, str] = {}
        added: list[AddedToken] = []
        for number, content in enumerate(self._control_ids):
            aliases[content] = alias = f"\ue000{nonce}-{number}\ue001"
            flags = {name: getattr(special.get(content), name, False) for name in ("lstrip", "rstrip")}
            # Not `normalized` (some old Llama tokenizers find a special token only after a space) nor `single_word`: an
            # alias that is missed would be read as text.
            added.append(AddedToken(alias, special=False, normalized=False, **flags))
        self._backend.add_tokens(added)
        return aliases

    def _make_real_ids(self, unk_token: str | None) -> IntArray:
        """From the backend's ids to the model's. -1 for a special token that did not come from an alias: some models'
        vocabularies hold these among the ordinary pieces, where text may hit them. Not so for the unknown token."""
        alias_ids = {content: int(self._backend.token_to_id(alias) or 0) for content, alias in self._aliases.items()}
        real_ids = np.arange(max([len(self), *(alias_id + 1 for alias_id in alias_ids.values())]), dtype=np.int64)
        for content in self._control_ids:
            coded = self._backend.token_to_id(content)
            if coded is not None and content != unk_token:
                real_ids[coded] = -1
        for content, alias_id in alias_ids.items():
            real_ids[alias_id] = self._control_ids[content]
        return real_ids

    def _respell(self, real: IntArray, coded: IntArray) -> list[int]:
        """Spells client text that hit a special token character by character instead."""
        result: list[int] = []
        for token_id, code in zip(real.tolist(), coded.tolist(), strict=True):
            if token_id >= 0:
                result.append(token_id)
                continue
            for char in self._backend.id_to_token(code) or "":
                pieces = [int(self._real_ids[piece.id]) for piece in self._backend.model.tokenize(char)]
                result += [piece_id for piece_id in pieces if piece_id >= 0]
        return result


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Longest first: of two tokens that start at one place, the tokenizers library takes the longer one."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _with_special(backend: Backend, content: str | None) -> Backend:
    """The backend, or a copy in which this added token is special, too."""
    if content is None or all(t.special or t.content != content for t in backend.get_added_tokens_decoder().values()):
        return backend
    parts = json.loads(backend.to_str())
    for token in parts["added_tokens"]:
        token["special"] = token["special"] or token["content"] == content
    return Backend.from_str(json.dumps(parts))


def _load_hf(path: str) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    folder = Path(path)
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        settings = folder / "tokenizer_config.json"
        kind = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
        # By the model_type of an original LLaVA ("llava") transformers would choose a class that loses first spaces.
        if kind in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
            return LlamaTokenizer.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _own_chat_template(path: str, hf: Any) -> str | None:
    """The processor's template goes before the tokenizer's: in vision models only it may show images."""
    folder = Path(path)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        own = json.loads((folder / "chat_template.json").read_text(encoding="utf-8")).get("chat_template")
    else:
        own = getattr(hf, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    return own if isinstance(own, str) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
