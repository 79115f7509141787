"""The derived series in a real archive: stored in Orthanc by DICOM's own protocol or HTTP, and fetched again."""

import io
import json
import shutil
import socket
import subprocess
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs the extra dicom")
pytest.importorskip("dcm2niix", reason="needs the extra dicom")

import dicoms
import pydicom
from commands import run

from copedit_rt.images.find import find_studies

ORTHANC = shutil.which("Orthanc") or shutil.which("orthanc") or shutil.which("Orthanc", path="/usr/sbin")
pytestmark = pytest.mark.skipif(ORTHANC is None, reason="needs Orthanc (Debian: orthanc)")


def free() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Iterator[tuple[str, int]]:
    """Address, and port of DICOM's own protocol."""
    folder, http, dicom = tmp_path_factory.mktemp("orthanc"), free(), free()
    config = {
        "Name": "test", "StorageDirectory": str(folder), "IndexDirectory": str(folder), "HttpPort": http,
        "DicomPort": dicom, "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomAlwaysAllowStore": True,
        "Plugins": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with subprocess.Popen(
        [str(ORTHANC), str(folder / "config.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        address, until = f"http://127.0.0.1:{http}", time.monotonic() + 60
        while time.monotonic() < until and server.poll() is None:
            try:
                ask(address, "/system")
                break
            except OSError:
                time.sleep(0.1)
        try:
            yield address, dicom
        finally:
            server.terminate()


def ask(address: str, path: str, body: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address + path, body), timeout=60) as answer:
        content = answer.read()
    return json.loads(content) if answer.headers.get_content_type() == "application/json" else content


def store(archive: tuple[str, int], folder: Path) -> None:
    """By C-STORE where a client is there, or else HTTP."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if client := shutil.which("storescu"):
        command = [client, "-aec", "test", "127.0.0.1", str(archive[1]), *map(str, paths)]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        return
    for path in paths:
        ask(archive[0], "/instances", path.read_bytes())


def test_stored_and_fetched(archive, brain_model, tmp_path):
    case = dicoms.study(tmp_path / "case")
    options = ["-o", tmp_path / "o", "--model", brain_model, "--resample"]
    assert run("synth", case, *options).exit_code == 0
    store(archive, case)
    store(archive, tmp_path / "o" / "case_t1ce_dicom")
    address, _ = archive
    (patient,) = ask(address, "/patients")  # one patient, one study: it is among its own
    (study,) = ask(address, f"/patients/{patient}/studies")
    series = {one["MainDicomTags"]["SeriesDescription"]: one for one in ask(address, f"/studies/{study['ID']}/series")}
    made = series["t1ce synthetic, CoPeDiT tiny-brain"]
    assert len(made["Instances"]) == 34 and len(series) == 6 + 1
    with zipfile.ZipFile(io.BytesIO(ask(address, f"/series/{made['ID']}/archive"))) as packed:
        fetched = [pydicom.dcmread(io.BytesIO(packed.read(name))) for name in packed.namelist()]
    stored = [pydicom.dcmread(path) for path in sorted((tmp_path / "o" / "case_t1ce_dicom").iterdir())]
    assert len(fetched) == 34 and all(one.SyntheticData == "YES" for one in fetched)
    for one in fetched:
        same = stored[one.InstanceNumber - 1]
        assert one.SOPInstanceUID == same.SOPInstanceUID and np.array_equal(one.pixel_array, same.pixel_array)
    whole = tmp_path / "fetched.zip"
    whole.write_bytes(ask(address, f"/studies/{study['ID']}/archive"))
    (found,) = find_studies(whole)  # as an archive exports it, with what was made of it
    assert set(found.files) == {"t1", "t2", "flair"} and not found.problem
    assert ("synthetic",) == tuple(why for one, why in found.source.left_out if "t1ce" in one.said)
