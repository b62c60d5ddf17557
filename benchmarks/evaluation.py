"""What an evaluation of 60,000 images of 32x32 costs: python benchmarks/evaluation.py [images]

Each part runs in a process of its own, on one thread: seconds, and the largest memory of the process. Writes
results/evaluation/cost.json. Inception's weights are a download, so its cost is taken in two halves. The
evaluation holds everything, with r-FID and r-IS computed from random features and logits of Inception's sizes
(2048 and 1008). The network itself, with random weights, takes as long as with the right ones: it is timed on
a few images, and so is AlexNet, for LPIPS."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PARTS = "libraries", "images in memory", "evaluation"
NETWORKS = "inception", "lpips"


def images(n):
    "Test batches: crops of photographs, as often as it takes."
    from bavq.training.data import Batches, load_images

    train = load_images("photos").train
    return Batches(
        train.repeat(-(-n // len(train)), 1, 1, 1)[:n], train.new_zeros(n).long(), 128, train=False
    )


def model(loader):
    "A model of the preset `quick`, as it is after its first batch."
    from bavq.core.distributed import set_seed
    from bavq.models.vqvae import VQVAE

    set_seed(0)
    net = VQVAE("ba_vq", codebook_size=256, embedding_dim=64, hidden_channels=16)
    net(next(iter(loader))[0])
    return net.eval()


def stand_in():
    "Random features and logits of Inception's sizes."
    import torch

    weight = torch.randn(3072, 2048 + 1008) / 55
    return lambda x: (x.flatten(1) @ weight).relu().split([2048, 1008], 1)


def part(name, n):
    "Run one part in this process."
    import torch

    torch.set_num_threads(1)
    from bavq.evaluation.evaluate import evaluate
    from bavq.evaluation.scores import Judges
    from bavq.evaluation.reports import train_eyes

    if name == "libraries":
        return {}
    loader = images(n)
    if name == "images in memory":
        return {}
    loader.labels = torch.arange(n) % 6
    evaluate(model(loader), loader, Judges({"fid": stand_in(), "fid_own": train_eyes(loader, 5)}))
    return {}


def network(name, n):
    """Milliseconds an image of a judge's network, original and reconstruction together, from a file of random
    weights."""
    import torch

    torch.set_num_threads(1)
    from bavq.evaluation.reports import Inception, make_lpips
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    from torchvision.models import alexnet

    x = torch.rand(n, 3, 32, 32) * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        if name == "inception":
            random = (
                mock.patch.multiple(fidelity, load_state_dict_from_url=lambda *a, **k: {}),
                mock.patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None),
            )
            with random[0], random[1]:
                net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        else:
            net = alexnet()
        torch.save(net.state_dict(), file)
        see = Inception(str(file)) if name == "inception" else make_lpips(str(file))
    began = time.process_time()
    with torch.no_grad():
        see(torch.cat([x, x])) if name == "inception" else see(x, -x)
    return dict(ms_per_image=round(1000 * (time.process_time() - began) / n, 2))


def measured(kind, name, n):
    "Seconds and largest memory of a part, in a process of its own."
    done = subprocess.run(
        [sys.executable, __file__, kind, name, str(n)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(n=60_000):
    from bavq.core.storage import write_json
    from bavq.core.provenance import environment

    parts = {}
    for name in PARTS:
        parts[name] = measured("part", name, n)
        print(f"{name}: {parts[name]}", flush=True)
    networks = {name: measured("network", name, 16) for name in NETWORKS}
    print(networks)
    write_json(
        ROOT / "results/evaluation/cost.json",
        dict(images=n, environment=environment(), parts=parts, networks=networks),
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) > 2:
        began = time.process_time()
        result = dict(part=part, network=network)[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            json.dumps(
                dict(cpu_seconds=round(time.process_time() - began, 1), peak_mb=round(memory)) | result
            )
        )
    else:
        main(*map(int, sys.argv[1:]))
