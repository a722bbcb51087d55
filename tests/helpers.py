"""What several test files share: runs here and in other processes, a clock, models, data."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
import torch

import train_gpt as tg

SCRIPT = Path(tg.__file__)
ROOT = SCRIPT.parent
THREADS = int(os.environ["OMP_NUM_THREADS"])  # of every process, set in conftest.py
HANG = 600  # seconds after which a process is taken to hang, on a machine however loaded
ON_CPU = {"DEVICE": "cpu"}  # where every test runs that does not say otherwise
# The variables that configure a run.
NAMES = {f.name.upper() for f in fields(tg.Config)} | {"USE_DEPTH_EMBED", "RANK", "WORLD_SIZE"}


def refused(job: Callable[..., Any], *args: Any) -> str:
    """The message with which a job refuses its input."""
    try:
        job(*args)
    except tg.InputError as error:
        return str(error)
    raise AssertionError(f"{job} was not refused")


# ---- Runs


def one_rank(device: str = "cpu") -> tg.World:
    """The only rank of a run."""
    return tg.World({}, device=device)


def run_here(env: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """A run in this process, in `folder`; what its result.json holds."""
    config = tg.Config.from_env(ON_CPU | {"RUN_ID": "run", **env, "LOG_DIR": str(folder)})
    assert tg.run(config, one_rank(config.device)) == 0
    return result_of(folder / config.run_id)


def keep_all_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a finished run, too, which else keeps its last one."""
    kept = property(lambda _: 99, lambda *_: None)
    monkeypatch.setattr(tg.Checkpoints, "keep", kept, raising=False)


def clean_environment() -> dict[str, str]:
    """The variables of this process without those that configure a run."""
    return {name: value for name, value in os.environ.items() if name not in NAMES}


def start(
    env: Mapping[str, str], ranks: int = 1, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    """A run in processes of its own as a user starts it: several ranks by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(script)]
    given = clean_environment() | ON_CPU | {"PYTHONPATH": str(ROOT)} | dict(env)
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=HANG)


class Ranks(NamedTuple):
    """How ranks ended: their exit codes (-9: killed) and what each wrote to its terminal."""

    codes: list[int | None]
    texts: list[str]


def set_up_forkserver() -> multiprocessing.context.ForkServerContext:
    """The server that processes are forked from: it has imported what takes long to import."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", "hypothesis", "pytest", "helpers"])
    return server


def fork_ranks(env: Mapping[str, str], ranks: int, job: Callable[[], int] = tg.main) -> Ranks:
    """Runs `job`, a function that can be pickled, on every rank, with variables `env`.

    The ranks are forked from a server that has imported PyTorch: a run takes a second, and ten
    under torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    server = set_up_forkserver()
    outs = [Path(env["LOG_DIR"]) / f"{port}.{rank}.out" for rank in range(ranks)]
    variables = [ON_CPU | dict(env) | world | {"RANK": str(rank)} for rank in range(ranks)]
    processes = [
        server.Process(target=become_rank, args=(job, given, out))
        for given, out in zip(variables, outs)
    ]
    try:
        with interrupts_held():
            for process in processes:
                process.start()
        for process in processes:
            process.join(HANG)
    finally:  # also after Ctrl-C
        for process in processes:
            process.kill()
            process.join()
    return Ranks([process.exitcode for process in processes], [out.read_text() for out in outs])


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block has ended: a process half started could not be ended."""
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for number in held[:1]:
            signal.raise_signal(number)


def become_rank(job: Callable[[], int], env: dict[str, str], out: Path) -> None:
    """Turns this forked process into a rank, whose output goes to the file `out`."""
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in os.environ.keys() & NAMES:
        del os.environ[name]
    os.environ.update(env)
    torch.set_num_threads(THREADS)
    default_signals()
    os._exit(job())


def default_signals() -> None:
    """As a shell in the foreground leaves them; below one in the background, some are ignored."""
    for number in tg.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def nobody_reads(full: bool) -> int:
    """A descriptor that takes nothing: of a full disk, or of a pipe that its reader has left."""
    if full:
        return os.open("/dev/full", os.O_WRONLY)
    read, write = os.pipe()
    os.close(read)
    return write


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Waits until something is so; `what` is said if that takes too long on any machine."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The training losses that a run logged."""
    return [row["train_loss"] for row in metrics(folder) if "train_loss" in row]


def result_of(folder: Path) -> dict[str, Any]:
    """A run's result.json."""
    return json.loads((folder / "result.json").read_text())


def log_of(folder: Path) -> str:
    """A run's log without the script that it opens with."""
    head, _, rest = (folder / "train.log").read_bytes().partition(b"\n")
    found = re.fullmatch(rb"script_bytes:(\d+) script_sha256:[0-9a-f]{64}", head)
    assert found, head
    return rest[int(found[1]) :].decode()


class ManualTime:
    """Stands in for the module `time` in the script: its clock moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def let_steps_take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's clock moves by so much with every step, and not otherwise."""
    clock, train_step = ManualTime(), tg.Trainer.train_step

    def timed(*args: Any) -> None:
        train_step(*args)
        clock.now += seconds

    monkeypatch.setattr(tg, "time", clock)
    monkeypatch.setattr(tg.Trainer, "train_step", timed)


# ---- Models

# Every part of the growing stack, at the smallest size, as variables.
GROWING = dict(
    PRESET="growing_live,tiny",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    NUM_PRELUDE="1",
    NUM_SHARED="1",
    NUM_CODA="1",
    XSA_LAST_N="1",
    VE_LAYERS="2",
    VE_DIM="8",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    TRAIN_SEQ_LEN="32",
    DTYPE="float32",
)
# A run of it that grows from one pass to three and rounds the core in its last quarter.
GROWTH = GROWING | dict(
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="64",
    ITERATIONS="8",
    PASSES_SCHEDULE="0:1,0.25:2,0.5:3",
    QAT_FRACTION="0.25",
    QAT_LR_FACTOR="0",
    WARMDOWN_ITERS="4",
    MAX_WALLCLOCK_SECONDS="0",
    TRAIN_LOG_EVERY="1",
    WARMUP_STEPS="1",
    EVAL_STRIDE="0",
    TTT_LR="0",
    VAL_BATCH_SIZE="4096",
    MATRIX_LR="0.01",
    SCALAR_LR="0.01",
    TIED_EMBED_LR="0.01",
)

# The smallest model with more than one head of each kind, in float32: what tests compute by hand.
DIMS: dict[str, Any] = dict(
    vocab_size=64, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=24, dtype="float32"
)


def architecture(preset: str = "", **values: Any) -> tg.Architecture:
    """A published system at that size."""
    a = tg.Config.from_env({"PRESET": preset}).architecture()
    return replace(a, **DIMS | dict(rope_dims=0) | values)


def small_config(env: Mapping[str, str], **values: Any) -> tg.Config:
    """A configuration of that size, without a time cap or a warm-down."""
    constant = dict(iterations=100, warmdown_iters=0, max_wallclock_seconds=0.0)
    return replace(tg.Config.from_env(env), **DIMS | constant | values)


def drawn(config: tg.Config, seed: int) -> tg.GPT:
    """A model as a run begins with it."""
    torch.manual_seed(seed)
    orthogonal = config.matrix_init == "orthogonal"
    return tg.GPT(config.architecture(), config.tied_embed_init_std, orthogonal)


def noisy_model(a: tg.Architecture, noise: float = 0.2, seed: int = 0) -> tg.GPT:
    """With noise on every parameter: as initialised, the residual branches are zero."""
    torch.manual_seed(seed)
    model = tg.GPT(a, 0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def role_name(p: Any) -> str:
    """The role that a parameter was made with."""
    return p.role


def stub_trainer(config: tg.Config, model: tg.GPT | None = None) -> tg.Trainer:
    """A trainer whose micro-batches come from the test."""
    batches: Any = SimpleNamespace(accumulation=1, sequences=2)
    return tg.Trainer(config, one_rank(), model or drawn(config, 0), batches)


def real_trainer(env: Mapping[str, str]) -> tg.Trainer:
    """A trainer on the data that `env` names."""
    config, world = tg.Config.from_env(ON_CPU | dict(env)), one_rank()
    batches = tg.Batches(tg.Tokens(config, "train"), config, world)
    return tg.Trainer(config, world, drawn(config, config.seed), batches)


def no_score(*_: Any) -> tg.Score:
    return tg.Score(0.0, 0.0, 0, 0, 0.0)


def train_only(trainer: tg.Trainer, folder: Path) -> None:
    """Trains and logs as a run does, in `folder`, but scores nothing."""
    log = tg.Log(folder, True)
    checkpoints = tg.Checkpoints(trainer.config, trainer.world, trainer.batches.tokens.total, log)
    trainer.train(tg.Reporter(trainer.config, log), checkpoints, no_score)


def make_steps(trainer: tg.Trainer, last: int) -> None:
    """Trains until `last` steps are made, as if they took no time."""
    for step in range(trainer.step, last):
        trainer.train_step(step, 0.0, trainer.batches.micro(step))
        trainer.step = step + 1


def check_resume(config: tg.Config, folder: Path, saved: int, last: int) -> tg.Trainer:
    """A run goes on from its checkpoint to the last bit, whatever it began with; its trainer.

    With a seed alone a run would come to the same state without a checkpoint.
    """
    trainer, log = tg.make_trainer(config, one_rank()), tg.Log(folder / "run", True)
    log.folder.mkdir()
    make_steps(trainer, saved)
    state = [t.clone() for t in trainer.state()]
    checkpoints = tg.Checkpoints(config, trainer.world, trainer.batches.tokens.total, log)
    with checkpoints.kept(trainer):
        checkpoints.save(trainer)
    make_steps(trainer, last)
    (path,) = log.folder.glob("*.ckpt")
    config = replace(config, resume=str(path))
    again = tg.make_trainer(config, one_rank())
    for t in again.state():
        t.fill_(0.5)
    tg.restore(again, tg.find_checkpoint(config, again, []), log)
    assert again.step == saved
    assert all(t.equal(was) for t, was in zip(again.state(), state, strict=True))
    make_steps(again, last)
    assert all(t.equal(one) for t, one in zip(again.state(), trainer.state(), strict=True))
    return trainer


def check_stored(model: tg.GPT, config: tg.Config, ids: torch.Tensor) -> tg.GPT:
    """What an artifact gives back: rounded weights, in the function that was trained.

    The second is told by the score of the same weights in a model that never was in an artifact.
    """
    read, found, _ = tg.load_model(tg.pack(model, config), "here")
    assert found == config.architecture()
    assert read.scoring.passes == (config.eval_passes or config.num_loops)
    for (name, p), stored in zip(model.named_parameters(), read.parameters(), strict=True):
        expected = p.detach().half().float()
        if tg.role_of(p).bits:
            expected = tg.dequantize_rows(*tg.store(p, config, None).tensors)
        assert stored.equal(expected), name
    same = tg.GPT(config.architecture())
    same.load_state_dict(read.state_dict())
    assert score_of(read, ids).equal(score_of(same, ids))
    return read


@torch.no_grad()
def score_of(model: tg.GPT, ids: torch.Tensor) -> torch.Tensor:
    """The loss of ids [B, T] with the passes that a model is scored with."""
    return model(ids, ids.roll(-1, 1), model.scoring)


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Copies of tensors as one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def noise_of(name: str, shape: list[int]) -> torch.Tensor:
    """Normal noise, of deviation 0.15, that follows from a name: what golden numbers are of."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.tensor(0.15 * draw.standard_normal(shape), dtype=torch.float32)


def random_tokens(length: int = 24, seed: int = 0) -> torch.Tensor:
    """Ids [2, length] below 64."""
    return torch.randint(64, (2, length), generator=torch.Generator().manual_seed(seed))


# ---- Data

BOS, PIECES = 1, 400
TEXTS = [
    "def f(x):\n    return [x, 'caf\u00e9']  # na\u00efve\n",
    "The quick  brown fox jumps.\n\n",
    "\u65e5\u672c " * 3,
    " leading and trailing ",
    "\ttabs\r\n",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0123456789",
]
# Options of a tokenizer that keeps the text as it is.
EXACT: dict[str, Any] = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
)


def shard_bytes(
    tokens: Any, magic: int = 20240520, version: int = 1, count: int | None = None
) -> bytes:
    """A shard; `magic`, `version` and `count` are what its header says."""
    body = np.asarray(tokens, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(body) if count is None else count
    return header.tobytes() + body.tobytes()


def write_shards(folder: Path, split: str, *shards: Any) -> Path:
    """Writes the shards of a split; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, tokens in enumerate(shards):
        (folder / f"fineweb_{split}_{i:06}.bin").write_bytes(shard_bytes(tokens))
    return folder


def write_manifest(folder: Path, tokenizer: Path) -> None:
    """Says of shards whose text is none that they are this tokenizer's."""
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    manifest = {"tokenizer": {"sha256": sha256}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def data_config(folder: Path, **values: Any) -> tg.Config:
    """Sequences of four tokens from the shards in a folder."""
    return replace(
        tg.Config(), data_path=str(folder), **dict(train_seq_len=4, vocab_size=65536) | values
    )


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def stub_world(
    rank: int = 0, size: int = 1, all_reduce: Callable[[torch.Tensor], torch.Tensor] = unchanged
) -> Any:
    """A rank of a run that exists in this process alone; `all_reduce` adds up over ranks."""
    cpu = torch.device("cpu")
    return SimpleNamespace(rank=rank, size=size, device=cpu, on_cuda=False, all_reduce=all_reduce)


def tokenizer_bytes(vocab_size: int = PIECES, **options: Any) -> bytes:
    """A SentencePiece model of at most so many pieces, learned from TEXTS."""
    model = io.BytesIO()
    chosen: dict[str, Any] = dict(model_type="bpe", byte_fallback=True, character_coverage=0.99)
    chosen |= options
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=3,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        num_threads=1,
        **chosen,
    )
    return model.getvalue()


# ---- Sealed files: magic and version, SHA-256 of the rest, codec, length, packed header and values

ARTIFACT_MAGIC, CHECKPOINT_MAGIC = b"GOLFGPT\x02", b"GOLFRUN\x02"


def sealed(body: bytes, magic: bytes = ARTIFACT_MAGIC) -> bytes:
    """A file whose checksum fits."""
    return magic + hashlib.sha256(body).digest() + body


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes, str]:
    """Header, values, codec of a sealed file that the script has made."""
    codec, length = data[40:48].rstrip(b"\0").decode(), struct.unpack_from("<Q", data, 48)[0]
    raw = tg.decompress(codec, data[56:], length)
    size = struct.unpack_from("<I", raw)[0]
    return json.loads(raw[4 : 4 + size]), raw[4 + size :], codec
