"""Made by tools/make_stub.py of the settings in expo/config/: change these."""

from collections.abc import Iterable
from os import PathLike
from typing import Any, Literal, overload

from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra
from expo.output.findings import Inspection
from expo.recipes import Recipe, RewardRecipe
from expo.verbs.compare import Compared
from expo.verbs.extrapolate import Extrapolated
from expo.verbs.generate import Generated
from expo.verbs.report import Report
from expo.verbs.score import Scored
from expo.verbs.sweep import Swept

__all__ = [
    "EnvironmentFailure",
    "ExpoError",
    "InputError",
    "MissingExtra",
    "__version__",
    "compare",
    "extrapolate",
    "generate",
    "inspect",
    "recipe",
    "report",
    "score",
    "sweep",
]

__version__: str

@overload
def extrapolate(
    *,
    sft: str | PathLike[str],
    dpo: str | PathLike[str] = "",
    alpha: float | Iterable[float] = (),
    target_step: float | Iterable[float] = (),
    output: str | PathLike[str] | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    workers: int | None = None,
    stream_sft: bool = False,
    max_shard_size: str | PathLike[str] = "keep",
    verify: bool = False,
    fsync: bool = True,
    push_to_hub: str | PathLike[str] | None = None,
    private: bool = False,
    alpha_for: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    exclude: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    missing: Literal["error", "copy-dpo"] = "error",
    vocab: Literal["error", "common"] = "error",
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    part: str | PathLike[str] | None = None,
    join: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[True],
) -> dict[str, Any]: ...
@overload
def extrapolate(
    *,
    sft: str | PathLike[str],
    dpo: str | PathLike[str] = "",
    alpha: float | Iterable[float] = (),
    target_step: float | Iterable[float] = (),
    output: str | PathLike[str] | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    workers: int | None = None,
    stream_sft: bool = False,
    max_shard_size: str | PathLike[str] = "keep",
    verify: bool = False,
    fsync: bool = True,
    push_to_hub: str | PathLike[str] | None = None,
    private: bool = False,
    alpha_for: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    exclude: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    missing: Literal["error", "copy-dpo"] = "error",
    vocab: Literal["error", "common"] = "error",
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    part: str | PathLike[str] | None = None,
    join: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
) -> Extrapolated:
    """Write θ(α) = θ_dpo + α(θ_dpo − θ_sft) as a checkpoint, streaming both in constant memory.

    >>> made = expo.extrapolate(sft="my-sft", dpo="my-dpo", alpha=0.3, output="my-expo")
    >>> made.path
    PosixPath('my-expo')
    >>> [one.status for one in expo.extrapolate(sft="my-sft", dpo="my-dpo", alpha=[0.1, 0.2], output="grid")]
    ['written', 'written']

    The checkpoints of a training run take the place of `dpo`, and a step that of α: `checkpoint=["100=a", "200=b"],
    target_step=500`.

    Returns:
        An `Extrapolated`: one output per α, with `path`, `status` and `to_pandas()`. It can be given wherever a path of
        a model is expected.

    Raises:
        InputError: The settings or inputs are at fault; nothing is left behind.
        EnvironmentFailure: I/O or the hub failed; the same call continues.

    Args:
        sft: The SFT checkpoint θ_sft, or the model a training run began with: a directory, hub id, or
            id@revision.
        dpo: The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it. [default:
            the last checkpoint]
        alpha: Extrapolation strength α; 0 is DPO itself, −1 is SFT; repeatable, one output each.
            [required]
        target_step: With checkpoint: a step to extrapolate to; repeatable, one output each.
        output: Output folder; may contain {alpha} or {step}. [default: checkpoints/<DPO
            name>-ExPO-a<A>, or -t<T>]
        as_adapter: Write a LoRA adapter that makes θ(α) of SFT, where DPO is one or with rank, instead
            of a checkpoint.
        rank: With as_adapter, where DPO is a whole checkpoint: the rank of the factors that approximate
            θ_dpo − θ_sft, layer by layer.
        device: Device to compute on; auto is the CPU, which keeps up with the disk.
        dtype: Data type of the written weights; auto keeps each DPO tensor's own.
        workers: Number of threads. [default: the CPU count, at most 4]
        stream_sft: Read SFT's tensors from the hub by byte ranges while they are combined, instead of
            downloading a copy.
        max_shard_size: Maximum size of an output file, such as 500MB or 5GB; keep preserves the DPO
            shard layout.
        verify: Checksum all weights: record the inputs' checksums, and check finished outputs against
            their manifest.
        fsync: Flush every file to disk before it gets its final name.
        push_to_hub: Upload the finished output to this model repository; may contain {alpha} or {step}.
        private: Create that repository as private, if it does not exist yet.
        alpha_for: Use another α for tensors whose names match; repeatable, the first match wins.
        exclude: Copy tensors whose names match from DPO, whatever alpha_for says; repeatable.
        missing: Tensors that only one model has: refuse the pair, or copy DPO's and drop SFT's.
        vocab: Vocabularies of different sizes: refuse the pair, or extrapolate the rows both have and
            copy DPO's rest.
        allow_pickle: Read weights that exist only as pickles (.bin), with torch's weights_only loader.
        allow_nonfinite: Accept NaN and infinity in θ(α) instead of refusing them.
        checkpoint: A checkpoint of the training run that began with SFT, and its step; repeatable. The
            last one is θ_dpo.
        rule: Name of the formula that makes θ(α), or θ of a step. [default: linear; relex for several
            checkpoint]
        data_parallel: Number of processes that share the work, each with GPUs of its own. [default: 1;
            with ray, as many as the cluster has room for]
        ray: Run these processes on the machines of a Ray cluster; auto takes the one that this machine
            belongs to.
        part: Do only part i of N, counted from 0; slurm takes i and N from the array job, slurm/N only
            i.
        join: Check that all N parts are finished and join them; with dry_run, say which are and which
            are not.
        overwrite: Replace an output made with different settings, once the new one is complete.
        dry_run: Print the plan and write nothing.
    """

@overload
def inspect(
    *,
    sft: str | PathLike[str],
    dpo: str | PathLike[str] = "",
    output: str | PathLike[str] | None = None,
    device: str | PathLike[str] = "auto",
    workers: int | None = None,
    allow_pickle: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: Literal[True],
) -> dict[str, Any]: ...
@overload
def inspect(
    *,
    sft: str | PathLike[str],
    dpo: str | PathLike[str] = "",
    output: str | PathLike[str] | None = None,
    device: str | PathLike[str] = "auto",
    workers: int | None = None,
    allow_pickle: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
) -> Inspection:
    """Measure ‖θ_dpo − θ_sft‖ per tensor, layer and module, and judge whether ExPO suits the pair.

    >>> found = expo.inspect(sft="my-sft", dpo="my-dpo")
    >>> found.suits
    'likely'
    >>> list(found.to_pandas())[:3]
    ['name', 'layer', 'module']

    Returns:
        An `Inspection` with `suits`, `verdict`, `total`, `modules`, `layers`, `tensors`, and `to_pandas()`, a row per
        tensor; with several `checkpoint`s of a training run also `trajectory`, how straight its way over the steps is.

    Raises:
        InputError: The settings or inputs are at fault, or the picture would replace something else.
        EnvironmentFailure: Reading failed.

    Args:
        sft: The SFT checkpoint θ_sft, or the model a training run began with: a directory, hub id, or
            id@revision.
        dpo: The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it. [default:
            the last checkpoint]
        output: Plot ‖Δ‖/‖θ_sft‖ by layer and module, or a training run's way over its steps, to this
            file (.png, .svg or .pdf).
        device: Device to compute on; auto is the CPU, which keeps up with the disk.
        workers: Number of threads. [default: the CPU count, at most 4]
        allow_pickle: Read weights that exist only as pickles (.bin), with torch's weights_only loader.
        checkpoint: A checkpoint of the training run that began with SFT, and its step; repeatable. The
            last one is θ_dpo.
        rule: Name of the formula that makes θ(α), or θ of a step. [default: linear; relex for several
            checkpoint]
        overwrite: Replace an output made with different settings, once the new one is complete.
        dry_run: Print the plan and write nothing.
    """

@overload
def generate(
    task: str | PathLike[str],
    *,
    model: str | PathLike[str] | None = None,
    sft: str | PathLike[str] | None = None,
    dpo: str | PathLike[str] | None = None,
    alpha: float | None = None,
    target_step: float | None = None,
    name: str | PathLike[str] | None = None,
    base_url: str | PathLike[str] | None = None,
    concurrency: int = 32,
    alpha_for: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    exclude: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    missing: Literal["error", "copy-dpo"] = "error",
    vocab: Literal["error", "common"] = "error",
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    engine: str | PathLike[str] = "auto",
    dataset: str | PathLike[str] | None = None,
    system: str | PathLike[str] | None = None,
    n: int = 1,
    batch_tokens: int = 16384,
    space: Literal["weights", "logits"] = "weights",
    temperature: float | None = None,
    top_k: int = 50,
    top_p: float = 0.9,
    presence_penalty: float = 0.1,
    frequency_penalty: float = 0.1,
    seed: int = 42,
    seed_mode: Literal["row", "shared"] = "row",
    max_tokens: int = 2048,
    stop_token_id: int | Iterable[int] = (),
    output_dir: str | PathLike[str] = ".",
    template_date: str | PathLike[str] | None = None,
    limit: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    chat_template: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[True],
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    part: str | PathLike[str] | None = None,
    join: int | None = None,
) -> dict[str, Any]: ...
@overload
def generate(
    task: str | PathLike[str],
    *,
    model: str | PathLike[str] | None = None,
    sft: str | PathLike[str] | None = None,
    dpo: str | PathLike[str] | None = None,
    alpha: float | None = None,
    target_step: float | None = None,
    name: str | PathLike[str] | None = None,
    base_url: str | PathLike[str] | None = None,
    concurrency: int = 32,
    alpha_for: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    exclude: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    missing: Literal["error", "copy-dpo"] = "error",
    vocab: Literal["error", "common"] = "error",
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    engine: str | PathLike[str] = "auto",
    dataset: str | PathLike[str] | None = None,
    system: str | PathLike[str] | None = None,
    n: int = 1,
    batch_tokens: int = 16384,
    space: Literal["weights", "logits"] = "weights",
    temperature: float | None = None,
    top_k: int = 50,
    top_p: float = 0.9,
    presence_penalty: float = 0.1,
    frequency_penalty: float = 0.1,
    seed: int = 42,
    seed_mode: Literal["row", "shared"] = "row",
    max_tokens: int = 2048,
    stop_token_id: int | Iterable[int] = (),
    output_dir: str | PathLike[str] = ".",
    template_date: str | PathLike[str] | None = None,
    limit: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    chat_template: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    part: str | PathLike[str] | None = None,
    join: int | None = None,
) -> Generated:
    """Answer a task's prompts with a model, or with θ(α), of which nothing is then written.

    >>> dpo = expo.generate("prompts.jsonl", model="my-dpo", limit=4, max_tokens=8)
    >>> dpo.output
    PosixPath('outputs_prompts/my-dpo.jsonl')
    >>> theta = expo.generate("prompts.jsonl", sft="my-sft", dpo="my-dpo", alpha=2.0, limit=4, max_tokens=8)
    >>> list(theta.to_pandas())
    ['prompt', 'output', 'length', 'finish_reason']

    Returns:
        A `Generated` with the files `output` and `meta`, `rows`, `failed`, and `to_pandas()`, a row per answer. Rows
        that failed are marked and do not raise: look at `failed` and `reason`.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call continues.

    Args:
        model: The model: a directory, hub id, or id@revision; for openai, its name on the server.
        sft: The SFT checkpoint θ_sft. With dpo and alpha, the engine loads θ(α) instead of model.
        dpo: The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it.
        alpha: Extrapolation strength α.
        target_step: With checkpoint: the step to extrapolate to, in place of α.
        name: Name of the output files, and of the generator in them. [default: the model's, or <DPO
            name>-ExPO-a<A>, -a<A>-logits or -t<T>]
        base_url: URL of the server (openai); its API key is read from OPENAI_API_KEY.
        concurrency: Maximum number of concurrent requests (openai).
        alpha_for: Use another α for tensors whose names match; repeatable, the first match wins.
        exclude: Copy tensors whose names match from DPO, whatever alpha_for says; repeatable.
        missing: Tensors that only one model has: refuse the pair, or copy DPO's and drop SFT's.
        vocab: Vocabularies of different sizes: refuse the pair, or extrapolate the rows both have and
            copy DPO's rest.
        allow_pickle: Read weights that exist only as pickles (.bin), with torch's weights_only loader.
        allow_nonfinite: Accept NaN and infinity in θ(α) instead of refusing them.
        checkpoint: A checkpoint of the training run that began with SFT, and its step; repeatable. The
            last one is θ_dpo.
        rule: Name of the formula that makes θ(α), or θ of a step. [default: linear; relex for several
            checkpoint]
        engine: Inference engine; auto is vLLM if it is installed and can run, else transformers.
        dataset: Read the task's prompts from a local file or another hub dataset.
        system: System message put before every prompt.
        n: Number of samples per prompt.
        batch_tokens: Token budget of one batch of the transformers engine, padding included (score on a
            CPU: at most 2,048).
        space: weights: the model has the weights θ(α); logits (exploratory, transformers only): SFT and
            DPO answer together, each token drawn from log π_dpo + α(log π_dpo − log π_sft), for about
            twice the time and memory.
        temperature: Sampling temperature; 0 is greedy decoding. [default: 0.7; mtbench: by category]
        top_k: Sample from the k most likely tokens; 0 or -1 for all (-1 is not sent to openai servers).
        top_p: Sample from the most likely tokens that together have this probability.
        presence_penalty: Presence penalty on generated tokens.
        frequency_penalty: Frequency penalty on generated tokens.
        seed: Seed of all random numbers.
        seed_mode: row: each row has a seed of its own, the same for every model and α; shared: every
            request uses seed.
        max_tokens: Maximum number of new tokens per answer.
        stop_token_id: Additional token id that ends an answer; repeatable.
        task: ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.
        output_dir: Folder that holds outputs_<task>/ and rewards_<task>/.
        template_date: The moment for a chat template that writes the date, such as 2024-03-01T10:00, so
            that outputs to compare have the same prompts; an existing output keeps its own. [default:
            now]
        limit: Use only the first N prompts; a larger limit later extends the run.
        device: Device of the transformers engine.
        dtype: Data type the model runs in; auto keeps the checkpoint's own, or is float32 for
            transformers on a CPU without bfloat16 arithmetic.
        chat_template: Jinja file to use instead of the model's own chat template.
        trust_remote_code: Run Python code that comes with the model.
        engine_arg: Argument passed on to the engine; VALUE is read as JSON if it is valid JSON;
            repeatable.
        tensor_parallel: Number of GPUs per engine (vllm). [default: all]
        overwrite: Replace an output made with different settings, once the new one is complete.
        dry_run: Print the plan and write nothing.
        data_parallel: Number of processes that share the work, each with GPUs of its own. [default: 1;
            with ray, as many as the cluster has room for]
        ray: Run these processes on the machines of a Ray cluster; auto takes the one that this machine
            belongs to.
        part: Do only part i of N, counted from 0; slurm takes i and N from the array job, slurm/N only
            i.
        join: Check that all N parts are finished and join them; with dry_run, say which are and which
            are not.
    """

@overload
def score(
    task: str | PathLike[str],
    *,
    name: str | PathLike[str],
    outputs: str | PathLike[str] | None = None,
    dataset: str | PathLike[str] | None = None,
    reward_model: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    implicit_reward: bool = False,
    sft: str | PathLike[str] | None = None,
    dpo: str | PathLike[str] | None = None,
    beta: float = 0.1,
    engine: str | PathLike[str] = "auto",
    batch_tokens: int = 16384,
    max_length: int | None = None,
    bos: Literal["auto", "template", "none"] = "auto",
    output_dir: str | PathLike[str] = ".",
    template_date: str | PathLike[str] | None = None,
    limit: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    chat_template: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[True],
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    part: str | PathLike[str] | None = None,
    join: int | None = None,
) -> dict[str, Any]: ...
@overload
def score(
    task: str | PathLike[str],
    *,
    name: str | PathLike[str],
    outputs: str | PathLike[str] | None = None,
    dataset: str | PathLike[str] | None = None,
    reward_model: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    implicit_reward: bool = False,
    sft: str | PathLike[str] | None = None,
    dpo: str | PathLike[str] | None = None,
    beta: float = 0.1,
    engine: str | PathLike[str] = "auto",
    batch_tokens: int = 16384,
    max_length: int | None = None,
    bos: Literal["auto", "template", "none"] = "auto",
    output_dir: str | PathLike[str] = ".",
    template_date: str | PathLike[str] | None = None,
    limit: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    chat_template: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    part: str | PathLike[str] | None = None,
    join: int | None = None,
) -> Scored:
    """Score answers with reward models: raw logits, one per answer.

    >>> scored = expo.score("prompts.jsonl", name="my-dpo", reward_model="my-rm")
    >>> scored.n, scored.rewards
    (4, PosixPath('rewards_prompts/my-dpo.jsonl'))
    >>> list(scored.to_pandas())
    ['reward_model', 'id', 'sample', 'reward', 'tokens', 'truncated']

    Returns:
        A `Scored` with the files `rewards` and `meta`, `n`, `mean`, `standard_error`, `failed`, `further` (the results
        of further reward models), and `to_pandas()`, a row per answer and reward model.

    Raises:
        InputError: The settings or inputs are at fault; what was finished before stays.
        EnvironmentFailure: The engine, the disk or the network failed; the same call continues.

    Args:
        name: Name of the output to score, as given to or chosen by `expo generate`.
        outputs: The file to score, if it is not outputs_<task>/<name>.
        dataset: Read mtbench's questions from a local file or another hub dataset.
        reward_model: A reward model with one label: a directory, hub id, or id@revision; repeatable:
            each one after the first writes NAME@<its name>.jsonl. [default: weqweasdas/RM-Mistral-7B]
        implicit_reward: Score with the implicit reward β(log π_dpo − log π_sft) of dpo over sft;
            alongside reward models, it writes NAME@implicit.jsonl.
        sft: The SFT checkpoint π_sft (implicit reward).
        dpo: The DPO checkpoint π_dpo trained from it; its tokenizer and chat template are used
            (implicit reward).
        beta: β, the scale of the implicit reward.
        engine: Engine that runs the reward model; auto is vLLM on a GPU if it is installed and expo has
            tested the architecture, else transformers; an existing output keeps its engine.
        batch_tokens: Token budget of one batch of the transformers engine, padding included (score on a
            CPU: at most 2,048).
        max_length: Maximum conversation length in tokens; longer ones are cut at the end. [default: the
            recipe's, else the model's]
        bos: template: rows begin as the chat template writes them; none: its BOS token is dropped, for
            reward models trained without it; auto: as the reward model's recipe says, else template.
        task: ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.
        output_dir: Folder that holds outputs_<task>/ and rewards_<task>/.
        template_date: The moment for a chat template that writes the date, such as 2024-03-01T10:00, so
            that outputs to compare have the same prompts; an existing output keeps its own. [default:
            now]
        limit: Use only the first N prompts; a larger limit later extends the run.
        device: Device of the transformers engine.
        dtype: Data type the model runs in; auto keeps the checkpoint's own, or is float32 for
            transformers on a CPU without bfloat16 arithmetic.
        chat_template: Jinja file to use instead of the model's own chat template.
        trust_remote_code: Run Python code that comes with the model.
        engine_arg: Argument passed on to the engine; VALUE is read as JSON if it is valid JSON;
            repeatable.
        tensor_parallel: Number of GPUs per engine (vllm). [default: all]
        overwrite: Replace an output made with different settings, once the new one is complete.
        dry_run: Print the plan and write nothing.
        data_parallel: Number of processes that share the work, each with GPUs of its own. [default: 1;
            with ray, as many as the cluster has room for]
        ray: Run these processes on the machines of a Ray cluster; auto takes the one that this machine
            belongs to.
        part: Do only part i of N, counted from 0; slurm takes i and N from the array job, slurm/N only
            i.
        join: Check that all N parts are finished and join them; with dry_run, say which are and which
            are not.
    """

@overload
def compare(
    *runs: str | PathLike[str],
    flips: int = 10,
    markdown: bool = False,
    task: str | PathLike[str] | None = None,
    output_dir: str | PathLike[str] = ".",
    dataset: str | PathLike[str] | None = None,
    intersect: bool = False,
    dry_run: Literal[True],
) -> dict[str, Any]: ...
@overload
def compare(
    *runs: str | PathLike[str],
    flips: int = 10,
    markdown: bool = False,
    task: str | PathLike[str] | None = None,
    output_dir: str | PathLike[str] = ".",
    dataset: str | PathLike[str] | None = None,
    intersect: bool = False,
    dry_run: Literal[False] = False,
) -> Compared:
    """Compare runs on the prompts they share; the first is the baseline.

    >>> scored = expo.score("prompts.jsonl", name="my-dpo-ExPO-a2.0", reward_model="my-rm")
    >>> compared = expo.compare("my-dpo", scored, task="prompts")
    >>> compared.to_pandas()[["name", "n"]].values.tolist()
    [['my-dpo', 4], ['my-dpo-ExPO-a2.0', 4]]
    >>> print(compared)  # doctest: +ELLIPSIS
    prompts, rewards by my-rm: 4 rows, 4 prompts
    ...

    Returns:
        A `Compared` with `comparison`, `text`, which is what it prints as, and `to_pandas()`, a row per reward model
        and run.

    Raises:
        InputError: A run is missing or damaged, or they cannot be paired.

    Args:
        flips: How many of each model's biggest wins and losses to list.
        markdown: Print the tables as GitHub Markdown.
        runs: Two or more runs: names, output files or reward files. The first is the baseline.
        task: The runs' task, as given to `expo generate`. [default: found from the runs]
        output_dir: Folder that holds outputs_<task>/ and rewards_<task>/.
        dataset: Read mtbench's questions from a local file or another hub dataset.
        intersect: If the runs' prompts differ, use the rows that all runs have, and list the rest.
        dry_run: Print the plan and write nothing.
    """

@overload
def sweep(
    *,
    sft: str | PathLike[str],
    dpo: str | PathLike[str] = "",
    alpha: float | Iterable[float] = (),
    target_step: float | Iterable[float] = (),
    with_sft: bool = False,
    search: Literal["grid", "race", "modules"] = "grid",
    switch: Literal["auto", "reload", "adapter"] = "auto",
    task: str | PathLike[str] = "ultrafeedback",
    output: str | PathLike[str] | None = None,
    likelihood: str | PathLike[str] | None = None,
    any_pair: bool = False,
    write: bool = False,
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    slice: int | None = None,
    confirm: float = 0.3,
    confidence: float = 0.95,
    indifference: float = 0.05,
    refine: bool = False,
    reward_model: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    reward_engine: str | PathLike[str] = "auto",
    reward_device: str | PathLike[str] = "auto",
    reward_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    reward_engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    reward_tensor_parallel: int | None = None,
    reward_batch_tokens: int = 16384,
    reward_max_length: int | None = None,
    reward_chat_template: str | PathLike[str] | None = None,
    reward_bos: Literal["auto", "template", "none"] = "auto",
    alpha_for: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    exclude: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    missing: Literal["error", "copy-dpo"] = "error",
    vocab: Literal["error", "common"] = "error",
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    engine: str | PathLike[str] = "auto",
    dataset: str | PathLike[str] | None = None,
    system: str | PathLike[str] | None = None,
    n: int = 1,
    batch_tokens: int = 16384,
    space: Literal["weights", "logits"] = "weights",
    temperature: float | None = None,
    top_k: int = 50,
    top_p: float = 0.9,
    presence_penalty: float = 0.1,
    frequency_penalty: float = 0.1,
    seed: int = 42,
    seed_mode: Literal["row", "shared"] = "row",
    max_tokens: int = 2048,
    stop_token_id: int | Iterable[int] = (),
    limit: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    chat_template: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[True],
) -> dict[str, Any]: ...
@overload
def sweep(
    *,
    sft: str | PathLike[str],
    dpo: str | PathLike[str] = "",
    alpha: float | Iterable[float] = (),
    target_step: float | Iterable[float] = (),
    with_sft: bool = False,
    search: Literal["grid", "race", "modules"] = "grid",
    switch: Literal["auto", "reload", "adapter"] = "auto",
    task: str | PathLike[str] = "ultrafeedback",
    output: str | PathLike[str] | None = None,
    likelihood: str | PathLike[str] | None = None,
    any_pair: bool = False,
    write: bool = False,
    data_parallel: int | None = None,
    ray: str | PathLike[str] | None = None,
    slice: int | None = None,
    confirm: float = 0.3,
    confidence: float = 0.95,
    indifference: float = 0.05,
    refine: bool = False,
    reward_model: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    reward_engine: str | PathLike[str] = "auto",
    reward_device: str | PathLike[str] = "auto",
    reward_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    reward_engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    reward_tensor_parallel: int | None = None,
    reward_batch_tokens: int = 16384,
    reward_max_length: int | None = None,
    reward_chat_template: str | PathLike[str] | None = None,
    reward_bos: Literal["auto", "template", "none"] = "auto",
    alpha_for: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    exclude: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    missing: Literal["error", "copy-dpo"] = "error",
    vocab: Literal["error", "common"] = "error",
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checkpoint: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    rule: str | PathLike[str] | None = None,
    engine: str | PathLike[str] = "auto",
    dataset: str | PathLike[str] | None = None,
    system: str | PathLike[str] | None = None,
    n: int = 1,
    batch_tokens: int = 16384,
    space: Literal["weights", "logits"] = "weights",
    temperature: float | None = None,
    top_k: int = 50,
    top_p: float = 0.9,
    presence_penalty: float = 0.1,
    frequency_penalty: float = 0.1,
    seed: int = 42,
    seed_mode: Literal["row", "shared"] = "row",
    max_tokens: int = 2048,
    stop_token_id: int | Iterable[int] = (),
    limit: int | None = None,
    device: str | PathLike[str] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    chat_template: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    engine_arg: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
) -> Swept:
    """Find the α whose answers a reward model prefers, with one live engine for every θ(α).

    >>> found = expo.sweep(sft="my-sft", dpo="my-dpo", reward_model="my-rm", alpha=[1, 2], task="prompts.jsonl",
    ...                    limit=16, max_tokens=16, output="my-sweep")
    >>> found.to_pandas()["alpha"].tolist()
    [0.0, 1.0, 2.0]
    >>> found.best_alpha in (0.0, 1.0, 2.0), found.picture
    (True, PosixPath('my-sweep/sweep.png'))

    Returns:
        A `Swept` with `best_alpha`, `verdict`, `picture`, `record` (sweep.json), `text`, which is what it prints as,
        and `to_pandas()`, a row per α.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: An engine, the disk or the network failed; the same call continues.

    Args:
        sft: The SFT checkpoint θ_sft, or the model a training run began with: a directory, hub id, or
            id@revision.
        dpo: The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it. [default:
            the last checkpoint]
        alpha: A candidate for α; repeatable. α = 0 is always measured as well. [default: 0.1 0.2 0.3
            0.4 0.5]
        target_step: With checkpoint: a candidate for the step to extrapolate to, in place of α;
            repeatable. The last checkpoint itself is always measured as well.
        with_sft: Also measure SFT itself, which is α = −1, for reference.
        search: grid: every α answers every prompt; race: α that fall behind are dropped, and the best
            one is tested on prompts set aside, for at most half of the tokens; modules (exploratory):
            after a race, further ones give attention, MLP, embeddings and parts of the depth α of their
            own, tested against one α for all.
        switch: How the policy's engine goes from one α to the next: reload gives it other weights;
            adapter, for a LoRA pair with vllm, has all α in one batch, each as an adapter that is
            applied to SFT; auto is adapter on a GPU where a test finds it as fast, with the same
            answers.
        task: ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.
        output: Folder for sweep.json, sweep.png, outputs_<task>/ and rewards_<task>/. [default:
            sweeps/<DPO name>]
        likelihood: Exploratory: read preference pairs under every θ(α) instead of generating and
            scoring answers: which is likelier, chosen or rejected. A .jsonl/.json/.parquet/.csv file
            with prompt, chosen and rejected, or a hub data set as id[@revision][:split] (transformers).
        any_pair: Sweep the pair even if `expo inspect` finds it unsuited.
        write: Write the checkpoint of the chosen α at the end.
        data_parallel: With ray, the number of engines that answer. [default: as many as the cluster has
            room for]
        ray: Run the engines on the machines of a Ray cluster; auto takes the one that this machine
            belongs to.
        slice: Prompts in the race's first look, and added at each later one. [default: a tenth, at
            least 10]
        confirm: Share of the prompts set aside to confirm the α that the race finds.
        confidence: Probability that the race drops no α that is as good as the one it trails.
        indifference: End the race once choosing its leader is expected to lose less than this, in
            standard deviations of the paired difference.
        refine: Let the race add α between the leader and its neighbours, and beyond the ends.
        reward_model: A reward model: a directory, hub id, or id@revision; repeatable: the first
            decides, and each of the others must see the gain as well. [default: weqweasdas/RM-
            Mistral-7B]
        reward_engine: Engine that runs the reward model; auto as in `expo score`.
        reward_device: Device of the reward model (transformers).
        reward_dtype: Data type the reward model runs in.
        reward_engine_arg: Argument passed to the reward model's engine; repeatable.
        reward_tensor_parallel: Number of GPUs for the reward model (vllm). [default: as dry_run shows]
        reward_batch_tokens: Token budget of one batch of the reward model.
        reward_max_length: Maximum conversation length of the reward model, in tokens.
        reward_chat_template: Jinja file to use instead of the reward model's own chat template.
        reward_bos: Like bos of `expo score`.
        alpha_for: Use another α for tensors whose names match; repeatable, the first match wins.
        exclude: Copy tensors whose names match from DPO, whatever alpha_for says; repeatable.
        missing: Tensors that only one model has: refuse the pair, or copy DPO's and drop SFT's.
        vocab: Vocabularies of different sizes: refuse the pair, or extrapolate the rows both have and
            copy DPO's rest.
        allow_pickle: Read weights that exist only as pickles (.bin), with torch's weights_only loader.
        allow_nonfinite: Accept NaN and infinity in θ(α) instead of refusing them.
        checkpoint: A checkpoint of the training run that began with SFT, and its step; repeatable. The
            last one is θ_dpo.
        rule: Name of the formula that makes θ(α), or θ of a step. [default: linear; relex for several
            checkpoint]
        engine: Inference engine; auto is vLLM if it is installed and can run, else transformers.
        dataset: Read the task's prompts from a local file or another hub dataset.
        system: System message put before every prompt.
        n: Number of samples per prompt.
        batch_tokens: Token budget of one batch of the transformers engine, padding included (score on a
            CPU: at most 2,048).
        space: weights: the model has the weights θ(α); logits (exploratory, transformers only): SFT and
            DPO answer together, each token drawn from log π_dpo + α(log π_dpo − log π_sft), for about
            twice the time and memory.
        temperature: Sampling temperature; 0 is greedy decoding. [default: 0.7; mtbench: by category]
        top_k: Sample from the k most likely tokens; 0 or -1 for all (-1 is not sent to openai servers).
        top_p: Sample from the most likely tokens that together have this probability.
        presence_penalty: Presence penalty on generated tokens.
        frequency_penalty: Frequency penalty on generated tokens.
        seed: Seed of all random numbers.
        seed_mode: row: each row has a seed of its own, the same for every model and α; shared: every
            request uses seed.
        max_tokens: Maximum number of new tokens per answer.
        stop_token_id: Additional token id that ends an answer; repeatable.
        limit: Use only the first N prompts; a larger limit later extends the run.
        device: Device of the transformers engine.
        dtype: Data type the model runs in; auto keeps the checkpoint's own, or is float32 for
            transformers on a CPU without bfloat16 arithmetic.
        chat_template: Jinja file to use instead of the model's own chat template.
        trust_remote_code: Run Python code that comes with the model.
        engine_arg: Argument passed on to the engine; VALUE is read as JSON if it is valid JSON;
            repeatable.
        tensor_parallel: Number of GPUs per engine (vllm). [default: all]
        overwrite: Replace an output made with different settings, once the new one is complete.
        dry_run: Print the plan and write nothing.
    """

@overload
def report(
    *runs: str | PathLike[str],
    output: str | PathLike[str] = "report.html",
    figures: str | PathLike[str] | None = None,
    overwrite: bool = False,
    task: str | PathLike[str] | None = None,
    output_dir: str | PathLike[str] = ".",
    dataset: str | PathLike[str] | None = None,
    intersect: bool = False,
    dry_run: Literal[True],
) -> dict[str, Any]: ...
@overload
def report(
    *runs: str | PathLike[str],
    output: str | PathLike[str] = "report.html",
    figures: str | PathLike[str] | None = None,
    overwrite: bool = False,
    task: str | PathLike[str] | None = None,
    output_dir: str | PathLike[str] = ".",
    dataset: str | PathLike[str] | None = None,
    intersect: bool = False,
    dry_run: Literal[False] = False,
) -> Report:
    """Write one HTML page about two or more runs, or a sweep: who wins, by how much, is it only longer, and where.

    >>> page = expo.report("my-sweep", output="my-sweep.html")
    >>> page.page, page.rows
    (PosixPath('my-sweep.html'), 16)

    Returns:
        A `Report` with `page`, `headline`, `notes`, `runs` and `figures`.

    Raises:
        InputError: The runs, or what is where the page goes, are at fault.
        EnvironmentFailure: Writing failed.

    Args:
        output: The page to write.
        figures: Also write the page's figures to this folder, as PNG and SVG.
        overwrite: Replace files that expo report did not write.
        runs: Two or more runs: names, output files or reward files. The first is the baseline.
        task: The runs' task, as given to `expo generate`. [default: found from the runs]
        output_dir: Folder that holds outputs_<task>/ and rewards_<task>/.
        dataset: Read mtbench's questions from a local file or another hub dataset.
        intersect: If the runs' prompts differ, use the rows that all runs have, and list the rest.
        dry_run: Print the plan and write nothing.
    """

def recipe(name: str) -> Recipe | RewardRecipe:
    """A known model by its name: its pair, α, source and published scores; or a known reward model.

    >>> pair = expo.recipe("zephyr-7b-beta")
    >>> pair.sft, pair.dpo, pair.alpha
    ('HuggingFaceH4/mistral-7b-sft-beta', 'HuggingFaceH4/zephyr-7b-beta', 0.1)

    Raises:
        InputError: There is none of that name; the message has those that are spelled like it.
    """
