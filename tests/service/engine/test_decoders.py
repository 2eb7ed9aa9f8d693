"""Decoder processes: the same pixels as without, and an end to whatever takes too long, too much memory, or crashes."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.images.errors import ImageError
from vitrine.models.images.frame import to_pixels
from vitrine.service.engine import decoders
from vitrine.service.engine.decoders import Decoders
from vitrine.service.engine.runtime import EngineError
from vitrine.service.errors import ServiceError

LIMITS = ImageLimits(pixels=40_000_000, side=16_384)
PREPROCESSING = Preprocessing(
    size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", resize_mode="shortest"
)


@contextmanager
def decoding(count=1, seconds=30.0, limits=LIMITS, preprocessing=PREPROCESSING):
    with Decoders(count, preprocessing, limits, seconds) as running:
        running.start()
        running.wait()
        yield running


OTHERS = set()


@pytest.fixture(autouse=True)
def processes_of_others():
    """Those that were there before: a bundle that is loaded for many tests has decoders of its own."""
    OTHERS.clear()
    OTHERS.update(psutil.Process().children())


def processes():
    """The decoder processes of this test."""
    own = [process for process in psutil.Process().children() if process not in OTHERS]
    return [process for process in own if "decoder" in " ".join(process.cmdline())]


def restarts(reason):
    return REGISTRY.get_sample_value("vitrine_decoder_restarts_total", {"reason": reason}) or 0


def costly_image():
    """A valid file that takes some tenths of a second: noise of 12 million pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (3000, 4000), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def refusal(decoders, data):
    with pytest.raises(ServiceError) as caught:
        decoders.decode(data)
    return caught.value


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_are_those_of_this_process(picture, format, mode):
    how = PREPROCESSING.model_copy(update={"resize_mode": mode})
    if mode == "squash":
        how = how.model_copy(update={"size": (24, 40), "interpolation": "bilinear"})
    data = picture(format)
    with decoding(preprocessing=how) as running:
        pixels = running.decode(data).pixels
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, to_pixels(decode(data, LIMITS).image, how, LIMITS))


def test_refusals_are_those_of_this_process(picture):
    limits = ImageLimits(pixels=2000, side=50)
    bad = [b"", b"no image", picture(size=(60, 40)), picture("PNG", size=(50, 40))[:60], picture(size=(2000, 1))]
    with decoding(limits=limits) as running:
        (before,) = processes()
        for data in bad:
            error = refusal(running, data)
            with pytest.raises(ImageError) as expected:
                to_pixels(decode(data, limits).image, PREPROCESSING, limits)
            assert (error.code, error.message) == (expected.value.code, expected.value.message)
        assert running.decode(picture(size=(50, 40))).pixels.shape == (3, 32, 32)
        assert processes() == [before]


def test_an_image_that_takes_too_long_is_ended_by_the_kernel_and_hurts_no_other(picture, monkeypatch):
    ask = decoders._Process.ask
    monkeypatch.setattr(decoders._Process, "ask", lambda self, image, _: ask(self, image, 60))  # the parent would wait
    late = restarts("timeout")
    with decoding(seconds=0.05) as running:
        (before,) = processes()
        error = refusal(running, costly_image())
        assert len(processes()) == 1, "another starts before it is needed"
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
        assert processes() != [before]
    assert (error.code, error.status) == ("image_too_costly", 413)
    assert "longer than 0.05 s" in error.message
    assert restarts("timeout") == late + 1


def test_a_process_that_does_nothing_is_ended_too(picture):
    """Its own timer counts processor time; the parent looks at the clock."""
    late = restarts("timeout")
    with decoding(seconds=0.5) as running:
        (before,) = processes()
        before.suspend()
        start = time.monotonic()
        assert refusal(running, picture()).code == "image_too_costly"
        assert time.monotonic() - start < 10
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
        assert not before.is_running()
    assert restarts("timeout") == late + 1


def test_a_large_image_is_sent_to_no_process_that_does_nothing():
    """It would fill the socket, and the thread that writes would wait for ever."""
    with decoding(seconds=0.5) as running:
        processes()[0].suspend()
        start = time.monotonic()
        assert refusal(running, bytes(8_000_000)).code == "image_too_costly"
        assert time.monotonic() - start < 10


def test_an_image_that_takes_too_much_memory_hurts_no_other(picture, monkeypatch):
    monkeypatch.setattr(decoders, "BASE_BYTES", 150 * 2**20)
    monkeypatch.setattr(decoders, "BYTES_PER_PIXEL", 0)
    full = restarts("memory")
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "PNG", compress_level=1)
    with decoding() as running:
        error = refusal(running, buffer.getvalue())  # 36 MB as levels, 144 MB as RGB
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
    assert (error.code, "memory" in error.message) == ("image_too_costly", True)
    assert restarts("memory") == full + 1


def test_memory_is_kept_from_one_image_to_the_next(draw, encode):
    """Returned and taken anew each time, its pages cost a fifth of the time of decoding."""

    def page_faults(process):
        with open(f"/proc/{process.pid}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[7])

    data = encode(draw(size=(500, 375)), "JPEG")
    with decoding(preprocessing=PREPROCESSING.model_copy(update={"size": (224, 224)})) as running:
        running.decode(data)
        (process,) = processes()
        before = page_faults(process)
        for _ in range(20):
            running.decode(data)
        assert (page_faults(process) - before) / 20 < 50  # else 320


def test_the_largest_images_fit_into_the_memory(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGBA", (4000, 3000), (1, 2, 3, 4)), "WEBP", lossless=True, quality=0, exif=exif)
    with decoding(limits=ImageLimits(pixels=12_000_000, side=4000)) as running:
        assert running.decode(data).pixels.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [(signal.SIGSEGV, "crash", "invalid_image"), (signal.SIGKILL, "memory", "image_too_costly")],  # the kernel's, too
)
def test_the_death_of_a_process_is_the_error_of_its_image_alone(picture, monkeypatch, number, reason, code):
    counted = restarts(reason)
    with decoding() as running:
        (process,) = processes()
        process.suspend()

        def send_and_kill(*message, send=decoders.send):
            send(*message)
            process.send_signal(number)
            process.resume()

        with monkeypatch.context() as deadly:
            deadly.setattr(decoders, "send", send_and_kill)
            assert refusal(running, picture()).code == code
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
    assert restarts(reason) == counted + 1


def test_a_process_killed_while_idle_is_replaced_unnoticed(picture):
    with decoding(count=2) as running:
        killed = processes()
        for process in killed:
            process.kill()
        while any(process.status() != psutil.STATUS_ZOMBIE for process in killed):
            time.sleep(0.01)
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
        assert not set(killed) & set(processes())


def test_signals_to_the_server_do_not_end_its_decoders(picture):
    """BentoML sends SIGTERM to its workers' children as well, whose answers are still wanted."""
    with Decoders(1, PREPROCESSING, LIMITS, 30) as running:
        running.start()
        before = processes()
        for _ in range(2):  # while it starts, and when it is ready
            for number in (signal.SIGTERM, signal.SIGINT):
                before[0].send_signal(number)
            running.wait()
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
        assert processes() == before


def test_many_threads_share_the_processes(picture):
    files = [picture("PNG", seed=seed, size=(50 + seed, 40)) for seed in range(8)]
    expected = [to_pixels(decode(data, LIMITS).image, PREPROCESSING, LIMITS) for data in files]
    with Decoders(2, PREPROCESSING, LIMITS, 30) as running, ThreadPoolExecutor(8) as threads:
        assert not processes(), "they are started when they are needed"
        answers = list(threads.map(running.decode, files * 8))
        assert len(processes()) == 2
    assert all(np.array_equal(answer.pixels, right) for answer, right in zip(answers, expected * 8, strict=True))
    assert not processes()


def test_leaving_ends_processes_at_work(picture):
    with ThreadPoolExecutor() as threads:
        with decoding() as running:
            processes()[0].suspend()
            asked = threads.submit(running.decode, picture())
            while running._idle:
                time.sleep(0.01)
        with pytest.raises(ServiceError) as caught:
            asked.result(timeout=10)
    assert caught.value.code == "not_ready"
    assert not processes()
    assert refusal(running, picture()).code == "not_ready"


def test_without_processes_nothing_is_ready_until_they_start_again(picture, monkeypatch):
    threads = threading.active_count()
    with Decoders(1, PREPROCESSING, LIMITS, 30) as running:
        assert running.can_decode()
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nowhere/python")
            with pytest.raises(EngineError, match="no process to decode images can be started"):
                running.start()
            assert refusal(running, picture()).code == "not_ready"
            broken.setattr(sys, "executable", "/bin/false")
            assert refusal(running, picture()).code == "not_ready"
            assert not running.can_decode()
        end = time.monotonic() + 30
        while not running.can_decode():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert running.decode(picture()).pixels.shape == (3, 32, 32)
        assert threading.active_count() < threads + 10


def test_processes_end_with_their_parent():
    program = (
        "import os; from test_decoders import *\n"
        "running = Decoders(2, PREPROCESSING, LIMITS, 30); running.start(); running.wait()\n"
        "print(*(p.pid for p in processes()), flush=True); os._exit(1)"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    finished = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    pids = [int(pid) for pid in finished.stdout.split()]
    assert len(pids) == 2, finished.stderr
    end = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
