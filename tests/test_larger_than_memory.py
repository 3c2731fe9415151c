"""Training on more images than there is memory for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT

# Prepares a set, trains stage one on it and extracts its codes. Prints the most memory, in kilobytes, that it took for
# anything but files, which the system can drop and read again.
PROGRAM = """
import threading, time
from pathlib import Path
from prior.codes import extract_cached
from tests.helpers import CPU
from vqvae import VQVAEConfig, VQVAETraining, codec, loss, train_vqvae
from vqvae.data.load import load_dataset
from vqvae.model import load_vqvae

def watch():
    while not done.wait(0.01):
        used.append(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")))

loss.EVALUATION_BATCH = codec.BATCH = 16  # what is passed at once is the same for all numbers of images
used, done = [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
config = VQVAEConfig(1, 4, 4, 0, 0, downsampling=8)
place = {"data_folder": Path("data"), "output_folder": Path("run"), "device": CPU}
train_vqvae(config, VQVAETraining(batch_size=16, num_epochs=1), dataset="images.npz", **place)
vqvae, header = load_vqvae(Path("run/vqvae.safetensors"), CPU)
extract_cached(vqvae, header.fingerprint, load_dataset("images.npz", Path("data")).train, "train", Path("run"))
done.set()
watcher.join()
print(max(used))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is used for")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks = []
    for num in (1000, 3000):  # 16 and 49 MB
        folder = tmp_path / str(num)
        folder.mkdir()
        images = np.empty((num, 128, 128), np.uint8)
        images[:] = np.arange(num).view(np.uint8).reshape(num, 1, 8).repeat(16, axis=2)  # no two are the same
        np.savez(folder / "images.npz", images=images)
        # The allocator gives back at once what is freed. Otherwise gaps would be counted too, and they vary.
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(1024 * int(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 10 * 10**6
