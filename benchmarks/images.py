"""Images a second, from a folder of X-rays of MIMIC's size to stored pictures and embeddings: ours, two DataLoaders, and the limit.

    .venv/bin/python benchmarks/images.py [--images 1500] [--grow 6000]

Every contender decodes each JPEG (about 2544 x 3056), makes the 518 px picture, encodes it again as JPEG, and embeds it with the same
ViT-tiny (224 px, random weights; bf16 where the hardware has it). Ours: the verbs `images` and `features`, with their reading,
writing and checkpoints. `plain`: a PyTorch DataLoader with PIL and torchvision, as a user would write it. `tuned`: a DataLoader
around our own functions, their hashes and quality flags included. `limit`: the same functions in one plain process a core, no
framework, nothing written. Rates count from where each worker has written its first batch: at the very first the others are nearly done
too, and would be counted for nothing. Start-up is stated apart. The files are copies of a few distinct pictures under names of their
own. The last line is JSON.
"""

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipelines.speed import memory, resident  # noqa: E402 - after the path is set

WIDTH, HEIGHT, DISTINCT, BATCH = 2544, 3056, 24, 32
CORES = os.cpu_count() or 1
FIRST = 2 * CORES  # files, or batches, by which all that work at once have written one: ours has two tasks a core


def make(folder: Path, count: int) -> Path:
    """A MIMIC of `count` studies of one X-ray each, its cohort, and a ViT-tiny on disk."""
    import cv2
    import numpy as np
    from transformers import ViTConfig, ViTModel
    from trees import cohort, write_tree

    rows = [{"dicom_id": f"d{i:06d}", "subject_id": 10000000 + i, "study_id": 50000000 + i} for i in range(count)]
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(DISTINCT):  # smooth shapes and detector noise: about 1.6 MB each, as MIMIC's are
        shape = cv2.resize(rng.integers(20, 235, (24, 20)).astype(np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(shape + rng.normal(0, 3, shape.shape), 0, 255).astype(np.uint8)
        pictures.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 93])[1].tobytes())
    for number, row in enumerate(cohort(write_tree(folder / "tree", metadata=rows), folder)[0]):
        path = Path(row["image_uri"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % DISTINCT])
    tiny = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=224, patch_size=16)
    ViTModel(tiny).save_pretrained(folder / "vit-tiny")
    print(f"{count:,} files of {np.mean([len(p) for p in pictures]) / 1e6:.2f} MB, {WIDTH} x {HEIGHT}")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p) for p in (folder / "tree").rglob("*.jpg"))


def ours(folder: Path) -> dict[str, float]:
    """Both verbs as a user runs them. Rate of each from its first files of rows on; together, of an image through both."""
    result = {}
    for verb, settings in (("images", ["cohort=cohort"]), ("features", [f"encoder=hf:{folder}/vit-tiny"])):
        config = folder / f"{verb}.yaml"
        config.write_text(f"out: {folder}\n")
        started = time.time()
        words = [sys.executable, "-m", "cxray", verb, str(config), *(w for s in settings for w in ("--set", s))]
        whole, driver = peaks(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        rate, first = written_rate(folder / verb / "data", started)
        result |= {f"{verb}_per_s": rate, f"{verb}_startup_s": first, f"{verb}_peak_gb": whole, f"{verb}_driver_gb": driver}
    result["per_s"] = 1 / (1 / result["images_per_s"] + 1 / result["features_per_s"])
    return result


def written_rate(data: Path, started: float) -> tuple[float, float]:
    """(rows a second after the first files, seconds to the very first), from the times at which the files were whole."""
    import pyarrow.parquet as pq

    done = sorted((p.stat().st_mtime, pq.read_metadata(p).num_rows) for p in data.rglob("*.parquet"))
    after = sum(rows for _, rows in done[FIRST:])
    return after / (done[-1][0] - done[FIRST - 1][0]), done[0][0] - started


def peaks(process: subprocess.Popen) -> tuple[float, float]:
    """(GB of all processes below this one, GB of `process`'s own) at their highest, until it ends."""
    whole = own = 0
    while process.poll() is None:
        whole, own = max(whole, memory()), max(own, resident(process.pid)[0])
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return whole / 1e9, own / 1e9


class Plain:
    """A data set as a user would write it: PIL and torchvision."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms

        self.files = files(folder)
        normal = transforms.Normalize([0.5] * 3, [0.5] * 3)
        self.prepare = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(), normal])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        from PIL import Image

        image = Image.open(self.files[i])
        small, sink = image.convert("L"), io.BytesIO()
        small.thumbnail((518, 518))
        square = Image.new("L", (518, 518))
        square.paste(small, ((518 - small.width) // 2, (518 - small.height) // 2))
        square.save(sink, "JPEG", quality=90)
        return self.prepare(image.convert("RGB")), sink.getvalue()


class Tuned:
    """A data set of our own decode and store."""

    def __init__(self, folder: Path) -> None:
        self.files = files(folder)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        import cv2

        from pipelines.images.decode import Limits
        from pipelines.images.job import ImagesConfig, picture
        from pipelines.images.stored import from_stored

        cv2.setNumThreads(1)
        jpeg = picture(Path(self.files[i]).read_bytes(), ImagesConfig(), Limits())["image"]
        return from_stored(jpeg), jpeg


def stacked(items):
    import numpy as np
    import torch

    pictures = [picture for picture, _ in items]
    return (torch.stack(pictures) if torch.is_tensor(pictures[0]) else np.stack(pictures)), [jpeg for _, jpeg in items]


def plain(folder: Path) -> dict[str, float]:
    """PIL, torchvision transforms, a DataLoader, the model in the main process."""
    import torch
    from transformers import ViTModel

    model = ViTModel.from_pretrained(folder / "vit-tiny").eval()

    def embed(batch: torch.Tensor) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(batch)

    return loaded(Plain(folder), embed)


def tuned(folder: Path) -> dict[str, float]:
    """The best DataLoader we can write: our functions in its workers, our encoder in the main process."""
    from models.encoders import load_image

    return loaded(Tuned(folder), load_image(f"hf:{folder}/vit-tiny"))


def loaded(dataset, embed) -> dict[str, float]:
    """Rate of a DataLoader with a worker a core, after its first batches."""
    import torch

    torch.set_num_threads(CORES)
    started, seen, ready = time.perf_counter(), 0, []
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, num_workers=CORES, collate_fn=stacked, multiprocessing_context="spawn", persistent_workers=True
    )
    for pixels, _ in loader:
        embed(pixels)
        seen += len(pixels)
        ready.append(time.perf_counter())
    return {"per_s": (seen - FIRST * BATCH) / (ready[-1] - ready[FIRST - 1]), "startup_s": ready[0] - started}


def limit(folder: Path) -> dict[str, float]:
    """One plain process a core, each with its share of the files."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        times = pool.starmap(bare, [(str(folder), share, CORES) for share in range(CORES)])
    return {"per_s": sum((count - BATCH) / seconds for count, seconds in times)}


def bare(folder: str, share: int, of: int) -> tuple[int, float]:
    import cv2
    import numpy as np
    import torch

    from models.encoders import load_image
    from pipelines.images.decode import Limits
    from pipelines.images.job import ImagesConfig, picture
    from pipelines.images.stored import from_stored

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    encoder, own, started = load_image(f"hf:{folder}/vit-tiny"), files(Path(folder))[share::of], 0.0
    for at in range(0, len(own), BATCH):
        stored = [picture(Path(f).read_bytes(), ImagesConfig(), Limits())["image"] for f in own[at : at + BATCH]]
        encoder(np.stack([from_stored(jpeg) for jpeg in stored]))
        started = started or time.perf_counter()
    return len(own), time.perf_counter() - started


def apart(name: str, folder: Path) -> dict[str, float]:
    """A contender in a process of its own."""
    words = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found['per_s']:.1f} images/s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--grow", type=int, help="then run ours on so many too, and compare the driver's memory")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        print(json.dumps(CONTENDERS[asked.contender](asked.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch) / "a", asked.images)
        before = apart("limit", folder)["per_s"]
        found = {name: apart(name, folder) for name in ("plain", "tuned", "ours")}
        bound = (before + apart("limit", folder)["per_s"]) / 2  # the machine's speed drifts: the limit is its mean, first and last
        figures = {"images": asked.images, "limit_per_s": bound}
        figures |= {f"{name}_{key}": value for name, of in found.items() for key, value in of.items()}
        own = found["ours"]
        figures |= {"to_limit": own["per_s"] / bound, "to_plain": own["per_s"] / found["plain"]["per_s"]}
        figures |= {"to_tuned": own["per_s"] / found["tuned"]["per_s"], "peak_gb": max(own["images_peak_gb"], own["features_peak_gb"])}
        if asked.grow:
            grown = apart("ours", make(Path(scratch) / "b", asked.grow))
            figures["driver_growth"] = grown["images_driver_gb"] / own["images_driver_gb"]
            figures["peak_gb"] = max(figures["peak_gb"], grown["images_peak_gb"], grown["features_peak_gb"])
    print(json.dumps({k: round(v, 3) for k, v in figures.items()}))


CONTENDERS = {"ours": ours, "plain": plain, "tuned": tuned, "limit": limit}

if __name__ == "__main__":
    main()
