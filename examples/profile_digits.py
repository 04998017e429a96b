"""One network at three learning rates: perturbations stay small, at the edge they neither grow nor die, beyond it they explode."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stableopt as so
from stableopt.report import read_run
from stableopt.report.figures import profile_figures, standalone_svg

RATES = {"stable": 1.0, "edge": 3.0, "unstable": 5.0}
SHOWN = {  # figure -> the file that the documentation shows
    "Exponent as the run goes": "exponents",
    "Growth from the first step": "paths",
    "Growth of all windows: stable": "windows_stable",
    "Growth of all windows: edge": "windows_edge",
    "Bound of the energy against measured growth: edge": "energy_edge",
    "Representations by initial parameters: edge": "layers_edge",
    "Response to an error of one update: unstable": "errors_unstable",
}


def train(lr: float, folder: Path, x: Tensor, y: Tensor, steps: int, start: int) -> None:
    """Train a 2-layer network with SGD and weight decay, and write the profile of the steps after the first into a folder."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, weight_decay=0.1)
    order = torch.Generator().manual_seed(0)
    with so.Profile(net, optimizer, folder, directions=4, probe=x[:32], errors=50, start=start):
        for _ in range(steps):
            index = torch.randint(len(x), (64,), generator=order)

            def closure(index: Tensor = index) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x[index]), y[index])
                loss.backward()
                return loss

            optimizer.step(closure)


def main(out: str = "runs/profile", steps: int = 1300, start: int = 300, pictures: str = "") -> dict[str, str]:
    """Train at the three rates; print and return the verdicts; write the figures into a folder if one is given."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits[:256] / 16), torch.tensor(labels[:256])
    x = 3 * (x - x.mean(0))
    verdicts = {}
    for name, lr in RATES.items():
        train(lr, Path(out, name), x, y, steps, start)
        verdict = read_run(Path(out, name)).profile.table("verdict")
        verdicts[name] = str(verdict["kind"])
        print(f"{name}: learning rate {lr:g}, {verdict['kind']} on {verdict['horizon']} steps ({verdict['reason']})")
    if pictures:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        for picture in profile_figures([read_run(Path(out, name)) for name in RATES]):
            if picture.title in SHOWN:
                file = Path(pictures, f"profile_{SHOWN[picture.title]}.svg")
                file.write_text(standalone_svg(picture), encoding="utf-8")
    return verdicts


if __name__ == "__main__":
    main(pictures=sys.argv[1] if len(sys.argv) > 1 else "")
