"""The commands. Each imports what it needs when it is called, so that help comes at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import convattn

app = typer.Typer(
    name="convattn",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Is attention worth it, on your images, with your network, and at what cost?",
)

COMPARE_EXAMPLES = """\b
Examples:
  convattn compare digits
  convattn compare photos/ --backbone timm:resnet18 --weights resnet18.safetensors
  convattn compare cifar/ --weights resnet20-12fca82f.th --variants se,cbam --seeds 10 --jobs 2
  convattn compare photos/ --backbone mine.py:network --epochs 50
  convattn compare digits --variants cbam --controls placebo,adapter,wider,noise
  convattn compare photos/ --until decided --max-seeds 12
  convattn compare convattn-photos-1a2b3c4d --add-seeds 3
  convattn compare photos/ --variants se,mine.py:MyGate
  convattn compare photos/ --folds 5
  convattn compare photos/ --val-as-test
  convattn compare photos/ --weights resnet18.safetensors --backbone timm:resnet18 --tune lr --audit-selection
  convattn compare photos/ --weights resnet20-12fca82f.th --variants cbam --gate-learning-rate 0.1
"""

SITES_EXAMPLES = """\b
Examples:
  convattn sites timm:resnet18
  convattn sites torchvision:mobilenet_v3_small --attention se --stages 3,4
  convattn sites torchvision:vgg11_bn --at block --where 'features.2*'
  convattn sites timm:convnext_atto --attention cbam+dual --at stage --image-size 224
"""

STATUS_EXAMPLES = """\b
Examples:
  convattn status convattn-photos-1a2b3c4d
"""

VERDICT_EXAMPLES = """\b
Examples:
  convattn verdict baseline.npz cbam.npz
  convattn verdict baseline.npz se.npz cbam.npz --smallest-gain 0.3
  convattn verdict baseline.npz cbam.npz --out judged
"""

REPORT_EXAMPLES = """\b
Examples:
  convattn report convattn-photos-1a2b3c4d
  convattn report judged
  convattn report convattn-photos-1a2b3c4d --measure
"""

DOCTOR_EXAMPLES = """\b
Examples:
  convattn doctor
  CONVATTN_BACKEND=reference convattn doctor
"""

BENCH_EXAMPLES = """\b
Examples:
  convattn bench
  convattn bench --op se --against timm,torchvision
  convattn bench --network timm:resnet50 --shapes 16x256x28x28
  THP_MEM_ALLOC_ENABLE=0 convattn bench --against timm,compile,plain
  convattn bench --device cuda --dtype bfloat16 --network resnet50 --batch 128
"""

TRUST = "Code that may be run where the folder of --add-seeds names it; may be given several times."

SHOW_EXAMPLES = """\b
Examples:
  convattn show convattn-digits-1a2b3c4d/runs/cbam-seed0/weights.safetensors cat.jpg dog.jpg --out shown
  convattn show weights.safetensors cat.jpg --layer layer3 --out shown
  convattn show weights.safetensors cat.jpg --trust mine.py:network --out shown
"""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convattn {convattn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(epilog=COMPARE_EXAMPLES)
def compare(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, an archive (.zip, .tar.xz) of one, a .csv of path,label[,split][,group], or "
            "'digits'."
        ),
    ],
    backbone: Annotated[
        str | None,
        typer.Option(
            help="resnet20 to resnet110, timm:NAME, torchvision:NAME or FILE.py:function.", show_default="resnet20"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="pretrained, none, or a file (safetensors or pickle of tensors).", show_default="none"),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Names or FILE.py:NAME joined with +, separated by commas.", show_default="se,cbam,dual,cbam+dual"
        ),
    ] = None,
    controls: Annotated[
        str | None,
        typer.Option(
            help="placebo, adapter, wider (each for every variant) and noise, separated by commas.",
            show_default="none",
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="identity or paper.", show_default="identity with loaded weights, else paper")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Trainings of each variant.", show_default="5; with --until the first 3")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="decided: add seeds one by one until every variant is decided, or hopeless.")
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(help="The most seeds with --until.", show_default="12")] = None,
    add_seeds: Annotated[
        int | None, typer.Option(help="Go on with the comparison whose folder is given as DATA, with more seeds.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="Test every image once for each seed, in so many folds.", show_default="none")
    ] = None,
    epochs: Annotated[int | None, typer.Option(show_default="30, with loaded weights 10")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels.", show_default="the network's, or the images' if less")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a training step.", show_default="128")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(show_default="0.05, with loaded weights 0.01, for batches of 128")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="For weights of two and more dimensions.", show_default="0.0005")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror training images.", show_default="flip, but not digits"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.", show_default="auto")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs at a time; changes no result.", show_default="as many as processor and memory allow, 1 on a GPU"
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Of the processor for each run.", show_default="the processor's over all runs, at least 1"),
    ] = None,
    smallest_gain: Annotated[
        float | None, typer.Option(help="Percentage points that are worth it.", show_default="0.5")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison, outside of DATA.", show_default="convattn-DATA-HASH"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another command that works in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
    gate_learning_rate: Annotated[
        float | None, typer.Option(help="Of what is attached, controls included.", show_default="that of the rest")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(help="lr: let each network choose its learning rate on validation images.", show_default="none"),
    ] = None,
    audit_selection: Annotated[
        bool,
        typer.Option(
            "--audit-selection",
            help="Score the test images at every epoch, only to show what choosing the epoch on them would report.",
        ),
    ] = False,
    val_as_test: Annotated[
        bool,
        typer.Option("--val-as-test", help="Test on val/, where there is no test/, and cut validation from train/."),
    ] = False,
    trust: Annotated[list[str] | None, typer.Option(help=TRUST, metavar="FILE.py:NAME", show_default="none")] = None,
) -> None:
    """Train a network with and without attention on your images, and say whether it is worth it.

    Interrupt it anywhere: the same command goes on where it was.
    """
    import convattn.compare

    convattn.compare.run(
        data,
        backbone=backbone,
        weights=weights,
        variants=variants,
        controls=controls,
        start=start,
        seeds=seeds,
        until=until,
        max_seeds=max_seeds,
        add_seeds=add_seeds,
        folds=folds,
        epochs=epochs,
        image_size=image_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        flip=flip,
        device=device,
        jobs=jobs,
        threads=threads,
        smallest_gain=smallest_gain,
        out=out,
        wait=wait,
        quiet=quiet,
        gate_learning_rate=gate_learning_rate,
        tune=tune,
        audit_selection=audit_selection,
        val_as_test=val_as_test,
        trust=tuple(trust or ()),
    )


@app.command(epilog=STATUS_EXAMPLES)
def status(folder: Annotated[Path, typer.Argument(help="A folder that 'compare' made.")]) -> None:
    """Tell where a comparison stands: who works there, which runs are done, and how far the others are.

    For a look from another terminal; nothing is changed.
    """
    from convattn.compare.status import status as lines

    sys.stdout.write("\n".join(lines(folder)) + "\n")


@app.command(epilog=VERDICT_EXAMPLES)
def verdict(
    baseline: Annotated[Path, typer.Argument(help="An .npz of the plain network.")],
    variants: Annotated[list[Path], typer.Argument(help="An .npz of each other network.", metavar="VARIANT...")],
    smallest_gain: Annotated[float, typer.Option(help="Percentage points that are worth it.")] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report and its numbers.", show_default="no report")
    ] = None,
) -> None:
    """Say whether variants are worth it from predictions that were made elsewhere.

    Each .npz has `right` (seeds, images), true or false, or `probabilities` (seeds, images, classes) and `labels`
    (images), of the same images in the same order; `groups` (images) may name the patient or video of each image.
    """
    from convattn.compare import elsewhere, scores

    found = elsewhere.results(baseline, variants, smallest_gain=smallest_gain)
    lines = [found["headline"], *(f"  {one['sentence']}" for one in found["variants"])]
    lines += scores.table(found["variants"])
    if out is not None:
        lines += ["", f"The report: {elsewhere.write(found, out)}"]
    sys.stdout.write("\n".join(lines) + "\n")


@app.command(epilog=REPORT_EXAMPLES)
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that 'compare' or 'verdict --out' wrote.")],
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the times of the networks once more before, on this machine."),
    ] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            help="Code that may be run with --measure if the folder names it; may be given several times.",
            metavar="FILE.py:NAME",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Draw the report of a comparison anew, from its results.json, without training, data or code of the user.

    Writes report.html, and the numbers beside it as results.csv and results.md.
    """
    from convattn import reporting

    if measure:
        from convattn.compare.continuing import measure_again

        path = measure_again(folder, trust=tuple(trust or ()))
    else:
        path = reporting.redraw(folder)
    sys.stdout.write(f"The report: {path}\n")


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor() -> None:
    """Tell which backend computes attention on this machine, why not another, and which settings matter."""
    from convattn.ops.doctor import status
    from convattn.tables import aligned

    sys.stdout.write("\n".join(aligned([[name, said] for name, said in status()], "<<")) + "\n")


@app.command(epilog=BENCH_EXAMPLES)
def bench(
    op: Annotated[str, typer.Option(help="cbam or se.")] = "cbam",
    network: Annotated[
        str, typer.Option(help="Also a training step of this network with it; a name of timm's, or as for compare.")
    ] = "none",
    against: Annotated[
        str, typer.Option(help="timm, torchvision, compile (timm's, compiled) and plain (ours in plain PyTorch).")
    ] = "timm,plain",
    shapes: Annotated[
        str | None, typer.Option(help="Maps, separated by commas.", show_default="six of a ResNet-50, and a small one")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of the candidates, more for small maps.")] = 11,
    batch: Annotated[int | None, typer.Option(help="Images for the network.", show_default="8")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the network's images in pixels.", show_default="224")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the network's under autocast.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for results.json, table.md and figure.svg.")] = Path("bench"),
) -> None:
    """Measure what attention costs on this machine beside what others ask for it. Ctrl-C keeps what is measured."""
    from convattn import bench as measuring
    from convattn import errors

    names = against.split(",")
    for option, value in (("batch", batch), ("image-size", image_size)):
        if value is not None and network == "none":
            raise errors.InvalidOption(f"bench: {option} is for the network, and none is measured; give --network too.")
    try:
        given = None if shapes is None else [tuple(int(size) for size in one.split("x")) for one in shapes.split(",")]
    except ValueError as error:
        raise errors.InvalidOption(f"bench: shapes are given as 16x256x28x28, got {shapes!r}.") from error
    result = measuring.Result()
    try:
        measuring.run(
            op,
            network=None if network == "none" else network,
            against=names,
            shapes=given,
            repeats=repeats,
            batch=8 if batch is None else batch,
            side=224 if image_size is None else image_size,
            device=device,
            dtype=dtype,
            said=lambda line: sys.stderr.write(line + "\n"),
            result=result,
        )
    finally:
        if result.maps:
            folder = measuring.save(result, names, out)
            sys.stdout.write(f"{measuring.text(result, names)}\n\nTable, figure and numbers: {folder}\n")


@app.command(epilog=SITES_EXAMPLES)
def sites(
    network: Annotated[
        str, typer.Argument(help="resnet20 to resnet110, timm:NAME, torchvision:NAME or FILE.py:function.")
    ],
    attention: Annotated[str, typer.Option(help="Name or FILE.py:NAME, or a gate and a head joined with +.")] = "cbam",
    at: Annotated[
        str,
        typer.Option(help="residual, residual-pre, residual-post, shortcut, block, stage, final, layer or pool."),
    ] = "residual",
    where: Annotated[
        str | None, typer.Option(help="Only these: globs of layers or of modules around them, separated by commas.")
    ] = None,
    stages: Annotated[str | None, typer.Option(help="Only these stages: numbers from 1, separated by commas.")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the images in pixels.", show_default="the network's own, or one that it takes"),
    ] = None,
) -> None:
    """List where attention would stand in a network, what it would add, and where it cannot stand, with the reasons.

    Multiply-adds are for one image.
    """
    from convattn import checks, errors, networks, plan
    from convattn.networks.cut import example_for

    if image_size is not None:
        checks.positive("sites", "image-size", image_size)
    try:
        numbers = None if stages is None else [int(one) for one in stages.split(",")]
    except ValueError as error:
        raise errors.InvalidOption(f"sites: stages must be numbers separated by commas, got {stages!r}.") from error
    model = networks.create(network)
    found = plan(
        model,
        attention,
        at=at,
        where=None if where is None else where.split(","),
        stages=numbers,
        example=None if image_size is None else example_for(model, side=image_size),
    )
    sys.stdout.write(f"{found}\n")


@app.command(epilog=SHOW_EXAMPLES)
def show(
    checkpoint: Annotated[Path, typer.Argument(help="A weights.safetensors that 'convattn compare' wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and numbers.")],
    layer: Annotated[str | None, typer.Option(help="Also the feature maps of this layer.")] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            help="Code that may be run if the checkpoint names it; may be given several times.",
            metavar="FILE.py:NAME",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Show what the gates of a trained network attend to, and which of them do nothing."""
    from convattn import showing

    folder = showing.show(checkpoint, images, out, layer=layer, trust=tuple(trust or ()))
    sys.stdout.write(f"{showing.table(folder)}\n\nPictures and numbers: {folder}\n")
