"""What `sparsejax doctor` looks at. Nothing is changed but for an empty probe file that goes away."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsejax.cli import show
from sparsejax.errors import ModelError

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "asimd", "sve")


@dataclass
class Check:
    """One finding. ``status`` is "ok", "note" (works, could be better) or "fail"."""

    name: str
    status: str
    detail: str
    fix: str = ""


def python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def requirements() -> Iterator[tuple[Any, str | None]]:
    """Our declared requirements as (Requirement, extra or None)."""
    from packaging.requirements import Requirement

    for text in metadata.requires("sparsejax") or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        yield requirement, extra[1] if extra else None


def parts(requirement: Any) -> Iterator[str]:
    """What the extras of a requirement need in turn: ``jax[cuda13]`` needs more than jax."""
    from packaging.requirements import Requirement

    if installed(requirement.name) is None:
        return
    for text in metadata.requires(requirement.name) or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            if any(needed.marker.evaluate({"extra": extra}) for extra in requirement.extras):
                yield needed.name


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages() -> Iterator[Check]:
    """The packages the core needs, against the versions it was made for."""
    found, wrong = [f"sparsejax {installed('sparsejax')}"], []
    for requirement, extra in requirements():
        if extra is not None:
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} (found {version or 'none'})")
        else:
            found.append(f"{requirement.name} {version}")
    yield Check("packages", "ok", ", ".join(found))
    if wrong:
        names = " ".join(f"'{text.partition(' ')[0]}'" for text in wrong)
        yield Check("packages", "fail", f"needed: {', '.join(wrong)}", f"{sys.executable} -m pip install {names}")


def extras() -> Iterator[Check]:
    """Optional parts and whether everything they need is here."""
    needed: dict[str, list[str]] = {}
    for requirement, extra in requirements():
        if extra is not None:
            needed.setdefault(extra, []).extend([requirement.name, *parts(requirement)])
    ready = [extra for extra, names in needed.items() if all(installed(name) for name in names)]
    absent = [extra for extra in needed if extra not in ready]
    text = f"installed: {', '.join(ready) or 'none'}; not installed: {', '.join(absent) or 'none'}"
    yield Check("extras", "ok", text)


def processor() -> Check:
    """CPU cores and the instructions that matter for matrix products."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.M)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*: (.+)$", text, re.M)).split())
    has = [feature for feature in CPU_FEATURES if feature in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = model[1] if model else platform.processor() or platform.machine()
    return Check("processor", "ok", f"{name}, {cores} cores, {' '.join(has) or 'features unknown'}")


def memory() -> Check:
    """Free main memory and a container's ceiling; too little is the usual reason for a killed process."""
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    ceiling = memory_ceiling()
    text = f"{show.size(free)} free of {show.size(total)}"
    if ceiling is not None and ceiling < total:
        free = min(free, ceiling)
        text += f", limited to {show.size(ceiling)} for this container"
    if free < 2**30:
        return Check("memory", "note", text, "less than 1 GiB is free: close programs or use a smaller model")
    return Check("memory", "ok", text)


def memory_ceiling() -> int | None:
    """Bytes that the control group of this process may use; None where there is no limit."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.exists() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None


def devices() -> Check:
    """The devices JAX computes on."""
    import jax

    found = [f"{d.platform}:{d.device_kind}" for d in jax.devices()]
    text = f"{jax.default_backend()}, {len(found)} device(s): {', '.join(sorted(set(found)))}"
    fix = ""
    if jax.default_backend() == "cpu" and Path("/dev/nvidiactl").exists():
        fix = f"a GPU is present but unused: {sys.executable} -m pip install 'sparsejax[cuda]'"
    elif jax.default_backend() == "cpu" and Path("/dev/accel0").exists():
        fix = f"a TPU is present but unused: {sys.executable} -m pip install 'sparsejax[tpu]'"
    return Check("devices", "note" if fix else "ok", text, fix)


def compile_cache(config: Any) -> Check:
    """The directory of compiled programs can be created and written."""
    directory = config.compile_cache_path()
    if directory is None:
        return Check("compile cache", "note", "off", "give --compile-cache-dir a directory for faster starts")
    fix = "give --compile-cache-dir a directory you may write, or '' to turn it off"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        return Check("compile cache", "fail", f"{directory} cannot be written: {error.strerror}", fix)
    used = sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
    return Check("compile cache", "ok", f"{directory}, {show.size(used)}")


def page_tiers(config: Any) -> Check:
    """Where KV pages go that the device has no room for, and whether there is room."""
    import psutil

    if not (config.host_kv_bytes or config.disk_kv_path):
        fix = "give --host-kv-bytes or --disk-kv-path with --disk-kv-bytes to keep prefixes that the device drops"
        return Check("page tiers", "ok", f"none; {fix}")
    texts, problems = [f"main memory {show.size(config.host_kv_bytes)}"], []
    if config.host_kv_bytes > (free := psutil.virtual_memory().available):
        problems.append(f"only {show.size(free)} of main memory is free: lower --host-kv-bytes")
    if config.disk_kv_path is not None:
        path = Path(config.disk_kv_path).expanduser()
        used = sum(file.stat().st_size for file in path.rglob("*.page"))
        texts.append(f"disk {path}, {show.size(used)} of {show.size(config.disk_kv_bytes)}")
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            problems.append(f"{place} cannot be written: give a directory that you may write")
        elif config.disk_kv_bytes - used > (free := psutil.disk_usage(str(place)).free):
            problems.append(f"only {show.size(free)} of the disk is free: lower --disk-kv-bytes")
    return Check("page tiers", "note" if problems else "ok", ", ".join(texts), "; ".join(problems))


def model(config: Any, check_nan: bool) -> Check:
    """The checkpoint loads; with ``check_nan`` every weight is finite too."""
    from sparsejax.models.loader import load_model

    started = time.monotonic()
    loaded = load_model(config.model, config.dtype, check_finite=check_nan)
    seconds = time.monotonic() - started
    shape = f"{loaded.config.family}, {loaded.config.num_layers} layers"
    text = f"{shape}, loaded in {seconds:.1f} s from {loaded.path}"
    text += ", every weight is finite" if check_nan else ""
    return Check("model", "ok", f"{text}, {filter_layers(loaded)}")


def filter_layers(loaded: Any) -> str:
    """Which layers select for the others under `omnikv` and `turbo`, and whether that was measured for the model."""
    from sparsejax.sparsity.calibration import read_filters
    from sparsejax.sparsity.policy import spread_filters

    measured = read_filters(loaded)
    layers = ", ".join(map(str, measured or spread_filters(loaded.config.num_layers)))
    source = "measured" if measured else "spread over the depth; `sparsejax calibrate` measures them"
    return f"filter layers {layers} ({source})"


def tokenizer(config: Any) -> Check:
    """The model's tokenizer loads; a model without one still serves token ids."""
    from sparsejax.models.files import find_model
    from sparsejax.models.tokenizer import load_tokenizer

    try:
        found = load_tokenizer(find_model(config.tokenizer or config.model))
    except ModelError as error:
        return Check("tokenizer", "fail" if config.tokenizer else "note", str(error))
    chat = "with" if getattr(found, "chat_template", None) else "without"
    return Check("tokenizer", "ok", f"{len(found)} tokens, {chat} a chat template")


def operations() -> Iterator[Check]:
    """Which implementation serves a usual call of each array operation here, and why the others do not."""
    import pallas_kernels

    for served in pallas_kernels.report():
        why = "; ".join(f"{other}: {shorten_reason(reason)}" for other, reason in served.declined.items())
        text = f"{served.op}: {served.backend or 'none'}" + (f" ({why})" if why else "")
        yield Check("operation", "ok" if served.backend else "fail", text)


def shorten_reason(reason: str) -> str:
    return show.shorten(reason, 90)
