"""The verifier as one file that needs numpy only and nothing of this package."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

from stableopt.files import write_atomically

__all__ = ["write_verifier"]

_MAIN = "import sys\n\nfrom stableopt_verifier.command import main\n\nsys.exit(main())\n"


def write_verifier(path: str | os.PathLike[str]) -> Path:
    """Write the verifier as a zip archive of its plain Python files, which Python runs as it is.

    ``python verify_stableopt.pyz model.cert.json`` then needs numpy and the standard library. The same version of the package
    always writes the same bytes.

    Args:
        path: the file, by convention ``verify_stableopt.pyz``; an old one is replaced.

    Returns:
        The path.

    Raises:
        OSError: if it cannot be written.

    Examples:
        >>> import subprocess, sys, tempfile
        >>> from stableopt.certify import certify
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = certify(torch.nn.ReLU(), (2,)).save(folder)
        ...     archive = write_verifier(f"{folder}/verify_stableopt.pyz")
        ...     found = subprocess.run(
        ...         [sys.executable, archive, f"{folder}/model.cert.json"], capture_output=True, text=True
        ...     )
        >>> print(found.stdout.splitlines()[-1])
        verified: Lipschitz constant in l2 <= 1.0
    """
    content = io.BytesIO()
    folder = Path(__file__).with_name("verifier")
    sources = {f"stableopt_verifier/{source.name}": source.read_text() for source in sorted(folder.glob("*.py"))}
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in {**sources, "__main__.py": _MAIN}.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    write_atomically(Path(path), content.getvalue())
    return Path(path)
