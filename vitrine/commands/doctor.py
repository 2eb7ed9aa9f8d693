"""`vitrine doctor`: what the service would run on, and why."""

from __future__ import annotations

from time import perf_counter

from vitrine.commands.common import BundlePath, new_console, open_bundle_or_default


def doctor(bundle: BundlePath = None) -> None:
    """Print what the service would use with the current settings, and why; then run one inference to check it."""
    import numpy as np
    import onnxruntime
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vitrine.models.bundle.layout import vision_file
    from vitrine.models.precision.instructions import int8_instructions
    from vitrine.models.precision.sessions import needs_precise_kernels
    from vitrine.models.tables import show
    from vitrine.service.engine.engine import Engine
    from vitrine.service.engine.processors import available_processors, memory_limit
    from vitrine.service.operations.settings import load_settings

    settings, opened, console = load_settings(), open_bundle_or_default(bundle), new_console()
    engine = Engine(opened, settings)
    runtime = engine.runtime
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "value", "reason"):
        table.add_column(heading, overflow="fold")
    (processors, why), (memory, why_memory) = available_processors(), memory_limit()
    rows = [
        ("bundle", f"{opened.manifest.name} {opened.digest[:19]}…", str(opened.path)),
        ("ONNX Runtime", onnxruntime.__version__, f"has {', '.join(onnxruntime.get_available_providers())}"),
        ("provider", runtime.provider, runtime.reasons["provider"]),
        ("precision", runtime.precision, runtime.reasons["precision"]),
        ("graph", vision_file(runtime.precision), f"the bundle has {', '.join(opened.manifest.precisions)}"),
        ("int8 instructions", int8_instructions() or "none", "/proc/cpuinfo"),
        (
            "byte products",
            "slower kernels" if needs_precise_kernels() else "exact",
            "checked by a product with a known sum; ONNX Runtime's usual kernels are tried first",
        ),
        ("processors", str(processors), why),
        ("memory", f"{memory / 2**30:.1f} GiB", why_memory),
        (
            "interventions",
            " and ".join(engine.interventions) or "none",
            "what the bundle has; rerun.onnx is loaded on first use" if engine.rerun else "what the bundle has",
        ),
        ("threads", str(runtime.threads), runtime.reasons["threads"]),
        ("batches", ", ".join(map(str, engine.batches)), f"warmed up; VITRINE_BATCH_SIZE={settings.batch_size}"),
    ]
    for row in rows:
        table.add_row(*map(Text, row))
    show(table, console)
    engine.warm_up()
    pixels = np.zeros((1, 3, *opened.manifest.preprocessing.size), np.float32)
    start = perf_counter()
    engine.explain(pixels)
    console.print(f"the graphs run; one image took {(perf_counter() - start) * 1e3:.1f} ms", style="green")
