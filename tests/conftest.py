"""Fixtures: a trained trio, data as others publish it, and a tiny random Llama pair, all made offline."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import helpers
import made_inputs
import pytest
import warm
from forks import Fork
from hub_server import WRITER, FakeHub
from made_inputs import Inputs
from sizes import FULL

from expo.cli import program as cli
from expo.rows import process


def pytest_configure() -> None:
    """Tests send SIGINT, which a job in the background of a shell starts with ignored."""
    gc.disable()  # until all modules are imported, a sixth of whose time it would take
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what this machine lacks skip themselves, saying so; side by side, the long ones come first."""
    for item in items:
        for marker, reason in _lacking().items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            if "vllm" in item.keywords:
                item.add_marker(pytest.mark.xdist_group("vllm"))  # they share engines, and each needs a core
        items.sort(key=lambda item: ("vllm" not in item.keywords, "slow" not in item.keywords))


def pytest_collection_finish() -> None:
    """All modules and tests stay: garbage is not looked for among them, and forks do not copy them."""
    gc.collect()
    gc.enable()
    gc.freeze()
    gc.set_threshold(700, 10, 100)  # else what is left is so little that all of it is looked through more often


@functools.cache
def _lacking() -> dict[str, str]:
    import torch

    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "no CUDA device"
    if importlib.util.find_spec("vllm") is None:
        lacking["vllm"] = "vLLM is not installed; tests/run.sh installs it"
    if os.environ.get("EXPO_TEST_NETWORK") != "1":
        lacking["network"] = "EXPO_TEST_NETWORK=1 is not set"
    if not FULL:
        lacking["full"] = "repeats on another case what is tested: EXPO_TEST_FULL=1 is not set"
    return lacking


@pytest.fixture(scope="session")
def inputs(request: pytest.FixtureRequest) -> Inputs:
    """The made inputs, or the real ones where a test asks for them, too (`on_real_inputs_too`)."""
    return (made_inputs.real() if getattr(request, "param", "made") == "real" else None) or made_inputs.made()


@pytest.fixture(scope="session")
def trained(inputs: Inputs) -> Path:
    """The folder of the trained trio: tiny-sft, tiny-dpo, tiny-rm."""
    return inputs.models


@pytest.fixture(scope="session")
def alpaca_data(inputs: Inputs) -> Path:
    """The folder of AlpacaEval outputs and MT-Bench questions and answers."""
    return inputs.data


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which vLLM's processes find the loader, also where expo was installed before it had one."""
    if entry_points(group="vllm.general_plugins", name="expo"):
        return {}
    folder = tmp_path_factory.mktemp("plugin")
    info = folder / "expo_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: expo-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nexpo = expo.engines.vllm_loader:register\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture(scope="session")
def checkpoint():
    """`helpers.write_checkpoint`: a checkpoint of any tensors, single or sharded."""
    return helpers.write_checkpoint


@pytest.fixture(scope="session")
def run_expo():
    """`helpers.run_expo`: the program in a process of its own → code, stdout, stderr."""
    return helpers.run_expo


@contextmanager
def _warm_process(kind: str) -> Iterator[Callable[..., Any]]:
    """`warm.py`, a process that has imported vLLM or expo; what is given asks it."""
    command = [sys.executable, Path(__file__).with_name("warm.py"), kind]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=helpers.environment(), stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )

    def ask(name: str, **asked: object) -> Any:
        process.stdin.write(json.dumps([name, asked]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="session")
def ask_warm() -> Iterator[Callable[..., Any]]:
    """Asks a process that has imported vLLM."""
    with _warm_process("vllm") as ask:
        yield ask


@pytest.fixture(scope="session")
def run_imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[helpers.Run]:
    """`python WORDS` in a process that has imported what commands without an engine need → code, stdout, stderr."""
    with _warm_process("expo") as ask:
        yield _runs_by(functools.partial(ask, "run"), tmp_path_factory)


@pytest.fixture(scope="session")
def run_warm(ask_warm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> helpers.Run:
    """`python WORDS` in a process that has imported vLLM already → code, stdout, stderr."""
    return _runs_by(functools.partial(ask_warm, "run"), tmp_path_factory)


@pytest.fixture(scope="session")
def serve_vllm(ask_warm: Callable[..., Any]) -> Callable[..., AbstractContextManager[Callable[[], str]]]:
    """vLLM's own server, started on a free port; what is given waits until it answers and returns its URL."""

    @contextmanager
    def serve(model: Path, *options: object, folder: Path, **env: str) -> Iterator[Callable[[], str]]:
        port, log = folder / "port", folder / "log"
        words = [Path(__file__).with_name("vllm_server.py"), port, "--model", model, "--enforce-eager"]
        server = ask_warm(
            "start",
            words=list(map(str, [*words, "--dtype", "float32", *options])),
            env=helpers.environment(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", **env),
            stdout=str(folder / "out"),
            stderr=str(log),
        )

        def answering() -> str:
            deadline = time.monotonic() + 300
            while True:
                if port.exists():
                    url = f"http://127.0.0.1:{port.read_text()}"
                    with suppress(URLError):
                        urlopen(f"{url}/health").close()
                        return url
                assert ask_warm("is alive", child=server), log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

        try:
            yield answering
        finally:
            ask_warm("end", child=server)

    return serve


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory: pytest.TempPathFactory) -> helpers.Run:
    """`python WORDS` in a fork of this process, which has imported transformers → code, stdout, stderr."""
    import transformers  # noqa: F401

    return _runs_by(warm.in_a_fork, tmp_path_factory)


def _runs_by(ask: Callable[..., int], folders: pytest.TempPathFactory) -> helpers.Run:
    def run(*words: object, env: dict[str, str] | None = None) -> helpers.Result:
        folder = folders.mktemp("warm")
        files = {name: str(folder / name) for name in ("stdout", "stderr")}
        code = ask(words=list(map(str, words)), env=helpers.environment(**(env or {})), **files)
        return helpers.Result(code, *(Path(file).read_text() for file in files.values()))

    return run


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> type[Fork]:
    """The workers of `--data-parallel` are forks of this process, which start in no time."""
    kind = type("Fork", (Fork,), {})
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": kind}))
    return kind


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster of two machines."""
    from clusters import Raylets

    raylets = Raylets(tmp_path_factory.mktemp("gate"))
    yield raylets
    raylets.shutdown()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub of the test's own; at the end nothing may have been asked that it does not know."""
    with FakeHub().serve() as hub:
        yield hub
    assert hub.unexpected == []


@pytest.fixture
def expo_on_hub(hub: FakeHub, tmp_path: Path, run_imported: helpers.Run) -> Callable[..., helpers.Result]:
    """The program in a process of its own that talks to `hub` and keeps its cache in tmp_path/home."""

    def run(*args: object, token: str | None = WRITER, **env: str) -> helpers.Result:
        settings = {**hub.environment(tmp_path / "home", token), **env}
        result = run_imported("-c", helpers.UNHURRIED, *args, env=settings)
        assert "Traceback" not in result.stderr or "--debug" in args
        secrets = [secret for secret in (token, env.get("HF_TOKEN")) if secret]
        for secret in secrets:
            assert secret not in result.stdout + result.stderr
            assert [name for name, content in helpers.tree(tmp_path).items() if secret.encode() in content] == []
        return result

    return run


@pytest.fixture
def expo(capsys: pytest.CaptureFixture[str]) -> Callable[..., helpers.Result]:
    """`expo extrapolate` in this process, on the inputs it is given."""

    def run(pair: helpers.Pair, *args: object) -> helpers.Result:
        code = cli.run(["extrapolate", "--sft", str(pair[0]), "--dpo", str(pair[1]), *map(str, args)])
        out, err = capsys.readouterr()
        return helpers.Result(code, out, err)

    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small random SFT/DPO pair of three tensors, the DPO side in two shards with side files."""
    sft, dpo = helpers.random_pair({"a.weight": (16, 8), "b.weight": (5, 3), "norm": (8,)})
    files = {"tokenizer.json": "{}", "README.md": "DPO's card", "custom/model.py": "x = 1\n"}
    return (
        helpers.write_checkpoint(tmp_path / "sft", sft),
        helpers.write_checkpoint(tmp_path / "dpo", dpo, shards=2, files=files),
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    """`adapters.Maker`: a base and a LoRA adapter of a case, each made once."""
    from adapters import Maker

    return Maker(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random tiny bfloat16 Llama pair with tokenizer and chat template; the DPO side in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=128, **shape)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokenizer = _tokenizer()
    for side, shard_size in (("sft", "5GB"), ("dpo", "20KB")):
        model.save_pretrained(folder / side, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder / side)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return folder / "sft", folder / "dpo"


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = special + [f"w{number}" for number in range(64 - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[3:]})
    fast.chat_template = helpers.CHAT_TEMPLATE
    return fast


def chromium() -> str | None:
    """Where a browser is."""
    named = os.environ.get("EXPO_TEST_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A chromium; a module that uses it has the mark xdist_group("browser"), so that few are started."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; tests/run.sh installs it"
    )
    program = chromium()
    if program is None:
        pytest.skip("no chromium here; tests/run.sh installs Debian's, or name one in EXPO_TEST_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()
