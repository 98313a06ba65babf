"""The ``trinity`` command. Verbs import what they need when they run, so that help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trinity.core.errors import TrinityError

app = typer.Typer(
    name="trinity",
    help="Pretrain, convert and sample hybrid mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Tokenizers and token shards.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(help="a TOML file, see configs/", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted overrides such as optim.muon.lr=2e-3", metavar="[KEY=VALUE]..."),
]


@app.command()
def pretrain(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="a TOML file (not with --resume), then overrides such as optim.muon.lr=2e-3",
            metavar="[CONFIG] [KEY=VALUE]...",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="where the run lives; default: output_dir/name-DATE")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="continue the run in this directory", metavar="RUN_DIR")
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="continue the run in --run-dir if there is one")
    ] = False,
) -> None:
    """Train a language model or a diffusion transformer; continue with --resume RUN_DIR.

    Exit status: 0 finished, 75 saved and stopped by SIGTERM or SIGUSR1 (resume continues),
    2 configuration, 3 data, 4 checkpoint, 5 training error.
    """
    from trinity.train.command import pretrain_command

    raise typer.Exit(pretrain_command(arguments or [], run_dir, resume, auto_resume=auto_resume))


@app.command()
def preflight(
    directory: Annotated[Path, typer.Option(help="where the run will be written")] = Path("runs"),
    min_free_gb: Annotated[float, typer.Option(help="free space every node must see")] = 10.0,
    device: str = "auto",
) -> None:
    """Check the machines of a job before the run: processes, network, disk, clocks, versions.

    Start it like the training, on all ranks. Exit status: 0 fit, 2 not, with the reason.
    """
    from trinity.train.preflight import preflight_command

    raise typer.Exit(preflight_command(directory, min_free_gb=min_free_gb, device=device))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="ranks of the job")] = 8,
    gpu: Annotated[str, typer.Option(help="kind of GPU, see trinity/plan/hardware.toml")] = "h200",
    layout: Annotated[
        str | None,
        typer.Option(help='layout to compare with, such as "dp_replicate=16,dp_shard=128,ep=8"'),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="layouts to list")] = 10,
    json: Annotated[Path | None, typer.Option(help="also write the numbers here")] = None,
) -> None:
    """Choose a parallel layout for a job: memory, traffic and predicted speed, on any machine.

    Compares with --layout, or with the [parallel] table of the configuration.
    """
    from trinity.plan.command import plan_command

    plan_command(
        config,
        overrides or [],
        num_gpus=gpus,
        gpu_name=gpu,
        layout=layout,
        top=top,
        json_path=json,
    )


@app.command()
def monitor(
    directory: Annotated[Path, typer.Argument(help="a run, or runs below", metavar="RUNS_DIR")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 5006,
    export: Annotated[
        Path | None, typer.Option(help="write an offline report here instead", metavar="FILE.html")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="run to select, by name; may be repeated")
    ] = None,
) -> None:
    """Show runs on a local web page while they train, or write them as one HTML file."""
    from trinity.monitor.command import monitor_command

    monitor_command(directory, host=host, port=port, export=export, runs=run or [])


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
) -> None:
    """Look for silent corruption: do the step after the newest checkpoint again, and compare.

    Start it like the training, on all ranks. Exit status: 0 the same each time, 5 not.
    """
    from trinity.train.command import replay_command

    raise typer.Exit(replay_command(run_dir))


@app.command()
def watch(
    directory: Annotated[
        Path, typer.Argument(help="a run, or a directory of runs", metavar="RUNS_DIR")
    ],
    host: Annotated[str, typer.Option(help="address to serve /metrics on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 9400,
    webhook: Annotated[
        str | None,
        typer.Option(
            envvar="TRINITY_WEBHOOK",
            help="address to POST alarms to; a secret, so better given in the environment",
        ),
    ] = None,
    poll_s: Annotated[float, typer.Option(help="seconds between two looks at the files")] = 5.0,
) -> None:
    """Serve the metrics of runs to Prometheus and send their alarms to a webhook, until stopped."""
    from trinity.monitor.exporter import watch_command

    watch_command(directory, host=host, port=port, webhook=webhook, poll_s=poll_s)


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="run or Hugging Face directory", metavar="DIR")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: int = 0,
) -> None:
    """Continue a prompt and print the text as it is produced."""
    from trinity.train.sample import continue_text

    for piece in continue_text(
        path,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command("sample-images")
def sample_images(
    path: Annotated[Path, typer.Argument(help="run on images", metavar="RUN_DIR")],
    output: Annotated[Path, typer.Option(help="grid of pictures", metavar="FILE.png")] = Path(
        "samples.png"
    ),
    classes: Annotated[str | None, typer.Option(help="the columns, such as 0,1,2")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="or columns from safetensors", metavar="FILE")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="pictures of each column")] = None,
    num_steps: Annotated[int | None, typer.Option(min=1)] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun or ancestral")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="1: none")] = None,
    scale: Annotated[
        int | None, typer.Option(min=1, help="edge of all patches, in base ones")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(min=0.0, help="threshold for larger patches, step by step")
    ] = None,
    calibrate: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="find tau for this share of coarse steps")
    ] = None,
    cache: Annotated[
        float | None, typer.Option(min=0.0, help="threshold of the first block cache; 0: none")
    ] = None,
    ema: Annotated[bool, typer.Option(help="the averaged weights, where there are any")] = True,
    seed: int = 0,
    save: Annotated[
        Path | None, typer.Option(help="also write the samples as safetensors", metavar="FILE")
    ] = None,
    device: str = "auto",
) -> None:
    """Draw pictures from the newest checkpoint of a run and write them as one grid.

    What is not given is as the table samples of the run's configuration says.
    """
    from trinity.train.sample_images import sample_images_command

    sample_images_command(
        path,
        output,
        classes=classes,
        embeddings=embeddings,
        overrides={
            "rows": rows,
            "num_steps": num_steps,
            "solver": solver,
            "guidance": guidance,
            "tau": tau,
            "cache": cache,
        },
        scale=scale,
        ema=ema,
        seed=seed,
        save=save,
        calibrate=calibrate,
        device=device,
    )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="run or Hugging Face directory", metavar="FROM")],
    target: Annotated[Path, typer.Argument(help="new Hugging Face directory", metavar="TO")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or keep what is there")] = "keep",
    layout: Annotated[
        str, typer.Option(help="per_expert, as released, or fused, as transformers holds it")
    ] = "per_expert",
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="size of one file")] = 5.0,
) -> None:
    """Write a Hugging Face AfmoeForCausalLM directory from a run, or re-shard an existing one.

    Streams: memory stays near the size of one file, whatever the model.
    """
    from trinity.ckpt.convert import convert_to_hf

    convert_to_hf(
        source, target, dtype=dtype, layout=layout, max_shard_bytes=int(max_shard_gb * 1e9)
    )
    typer.echo(f"wrote {target}")


@app.command()
def params(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print total and active parameters of a configuration, without allocating the model."""
    from trinity.core.load_config import load_any_config
    from trinity.models.build import parameter_counts

    for name, count in parameter_counts(load_any_config(config, overrides or []).model).items():
        typer.echo(f"{name:<16}{count:>20,}")


@app.command()
def doctor() -> None:
    """Print versions, devices, and which optional packages are active, or why not."""
    from trinity.core.doctor import report

    report()


@data_app.command("build")
def data_build(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build what a configuration trains on, token shards or an index of images; describe it."""
    from trinity.core.load_config import load_any_config
    from trinity.train.command import describe_data

    describe_data(load_any_config(config, overrides or []))


@data_app.command("show-step")
def data_show_step(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    step: Annotated[int, typer.Argument(min=1, help="as in the record: the first is 1")],
) -> None:
    """List the documents that a step of a run trains on."""
    from trinity.train.command import show_step

    show_step(run_dir, step)


@data_app.command("skip")
def data_skip(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    first_step: Annotated[int, typer.Argument(min=1, help="the first step whose rows are bad")],
    last_step: Annotated[int, typer.Argument(min=1, help="the last of them")],
    reason: Annotated[str, typer.Option(help="kept with the run")] = "skipped by hand",
) -> None:
    """Never train on the rows of these steps again, from whatever checkpoint the run resumes.

    Steps are counted on the path so far: of several windows, skip the latest first.
    """
    from trinity.train.command import skip_rows_command

    skip_rows_command(run_dir, first_step, last_step, reason)


def main() -> None:
    """Run the command line; errors that a user can mend print one line and set the exit status."""
    # Nothing here ever needs a hub: a slow or absent network must not delay or fail a run.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait spin this long before they sleep. The default, fifteen times as long, makes
    # a step several times slower as soon as another process wants one of the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        app()
    except TrinityError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
