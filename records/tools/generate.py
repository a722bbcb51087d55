r"""Continues a prompt with the model in an artifact, token by token.

    python records/tools/generate.py logs/<run> "The city of" \
        --temperature 0.8 --seed 1

The artifact is that of a run's folder, or a file such as logs/<run>/model.ptz.
It ends where the model ends the document. The tokenizer is the one that the
result.json beside the artifact names, if there is one.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import sentencepiece as spm
    import torch
    from torch import Tensor

    import train_gpt as tg
    from records.tools import common


class Model(NamedTuple):
    """A model from an artifact, and the context that it was trained on."""

    gpt: tg.GPT
    vocab_size: int
    context: int  # tokens


class Sampling(NamedTuple):
    """How tokens are drawn."""

    temperature: float  # 0: always the likeliest token
    top_k: int  # 0: all tokens
    seed: int
    tokens: int  # at most


@torch.inference_mode()
def next_logits(model: tg.GPT, ids: list[int]) -> Tensor:
    """float32 logits [V] of the token that follows."""
    head = getattr(model, "lm_head", model.tok_emb)
    last = model.hidden(torch.tensor([ids], device=head.device), model.scoring)[0][0, -1].float()
    return (model.softcap * torch.tanh(head.float() @ last / model.softcap)).cpu()


def draw(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    """A token of softmax(logits / temperature), of the `top_k` likeliest (0: of all).

    At temperature 0 it is the likeliest one.
    """
    if not temperature:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))


def generate(model: Model, ids: list[int], how: Sampling) -> Iterator[int]:
    """Tokens behind `ids`, each from the context before it; ends in front of a new document."""
    ids, first = list(ids), ids[0]
    random = torch.Generator().manual_seed(how.seed)
    for _ in range(how.tokens):
        logits = next_logits(model.gpt, ids[-model.context :])
        token = draw(logits, how.temperature, how.top_k, random)
        if token == first:
            return
        ids.append(token)
        yield token


def stream(
    tokenizer: spm.SentencePieceProcessor, ids: list[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Text as it grows. What ends inside a character waits for the rest of it."""
    shown = tokenizer.decode(ids)
    yield shown
    for token in tokens:
        ids = [*ids, token]
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def find_artifact(path: Path) -> Path:
    """The artifact that a path names: a file, or that of a run's folder. InputError without one."""
    give = f"give the folder of a finished run, or the {tg.ARTIFACT} in it"
    if not path.exists():
        raise tg.InputError(f"{path} is not there: {give}")
    if not path.is_dir():
        return path
    if not (path / tg.ARTIFACT).exists():
        raise tg.InputError(f"{path} holds no {tg.ARTIFACT}: {give}")
    return path / tg.ARTIFACT


def find_tokenizer(artifact: Path, named: Path | None) -> Path:
    """The tokenizer that is named, else that of the run beside whose result the artifact lies.

    Without either, the contest's.
    """
    if named:
        return named
    result = artifact.parent / "result.json"
    if not result.exists():
        return common.ROOT / tg.Config().tokenizer_path
    told = common.read_result(result).get("config", {}).get("tokenizer_path", "")
    for path in (Path(told), common.ROOT / told):
        if told and path.is_file():
            return path
    raise tg.InputError(f"{told}, the tokenizer in {result}, is not there: name it by --tokenizer")


def read_model(artifact: Path, tokenizer: Path) -> Model:
    """The model of an artifact, on the GPU if there is one.

    InputError if the artifact names another tokenizer.
    """
    data = artifact.read_bytes()
    gpt, architecture, _ = tg.load_model(data, str(artifact))
    tg.check_artifact_tokenizer(data, str(artifact), tg.Config(tokenizer_path=str(tokenizer)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(gpt.to(device), architecture.vocab_size, architecture.train_seq_len)


def check(options: argparse.Namespace) -> Sampling:
    """How to draw; InputError for what cannot be drawn from, or a prompt that is not UTF-8."""
    if not 0 <= options.temperature < math.inf:
        raise tg.InputError(f"--temperature {options.temperature} is no number from 0 on")
    common.require_at_least(options, top_k=0, tokens=0)
    if not 0 <= options.seed < 2**64:
        raise tg.InputError(f"--seed {options.seed} is not from 0 to 2^64 - 1")
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise tg.InputError("the prompt is not UTF-8") from None
    return Sampling(options.temperature, options.top_k, options.seed, options.tokens)


def show(pieces: Iterator[str]) -> None:
    """Prints the text as it grows; InputError, in a line, if nobody can read it any more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a terminal that does not know a character
    try:
        for text in pieces:
            print(text, end="", flush=True)
        print(flush=True)
    except OSError as error:
        common.silence(sys.stdout)
        raise tg.InputError(f"the output cannot be written: {error.strerror}") from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("artifact", type=Path, help="Folder of a finished run, or the model.ptz in it.")
    add("prompt", nargs="?", default="", help="The text to continue (default: a new document).")
    add("--tokens", type=int, default=200, help="Most tokens to print (default: %(default)s).")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="Temperature; 0 always takes the likeliest token (default: %(default)s).",
    )
    add(
        "--top-k",
        type=int,
        default=40,
        help="Number of the likeliest tokens to draw from; 0 means all (default: %(default)s).",
    )
    add(
        "--seed",
        type=int,
        default=1337,
        help="Seed of the draws; the same seed gives the same text (default: %(default)s).",
    )
    add(
        "--tokenizer",
        type=Path,
        help="SentencePiece model (default: the one in the result.json beside the artifact).",
    )
    return top


def work(options: argparse.Namespace) -> int:
    how, artifact = check(options), find_artifact(options.artifact)
    path = find_tokenizer(artifact, options.tokenizer)
    model = read_model(artifact, path)
    tg.ByteCounter.from_sentencepiece(path, model.vocab_size)  # has it the model's size?
    tokenizer = spm.SentencePieceProcessor(model_file=str(path))
    ids = [tokenizer.bos_id(), *tokenizer.encode(options.prompt)]
    show(stream(tokenizer, ids, generate(model, ids, how)))
    return 0


def main() -> int:
    return common.run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
