"""The files for containers, systemd and Kubernetes parse, and start the service with options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_docs import unknown_options

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "howto" / "serve.md").read_text(encoding="utf-8")


def test_compose_starts_the_service_and_a_prometheus_that_scrapes_it() -> None:
    found = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    service = found["services"]["ringmark"]
    words = service["command"]
    assert not unknown_options(words[words.index("serve") :])
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    for option in ("--key", "--tokens", "--jobs"):
        assert words[words.index(option) + 1] in mounted
    scraping = yaml.safe_load(found["configs"]["prometheus"]["content"])["scrape_configs"][0]
    assert scraping["static_configs"] == [{"targets": ["ringmark:8000"]}]
    token = scraping["authorization"]["credentials_file"]
    assert any(volume.split(":")[1] == token for volume in found["services"]["prometheus"]["volumes"])


def test_kubernetes_starts_the_service() -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    deployment, service = yaml.safe_load_all(block)
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert not unknown_options(list(container["args"]))
    volumes = {volume["name"] for volume in pod["volumes"]}
    for each in (*pod["initContainers"], container):
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]


def test_systemd_starts_the_service() -> None:
    command = re.search(r"ExecStart=\S+/ringmark (.*?[^\\])\n", PAGE, re.DOTALL)
    assert command and not unknown_options(command[1].replace("\\\n", " ").split())


def test_the_image_gets_all_that_is_installed() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert {"setup.cfg", "pyproject.toml", "constraints.txt", "ringmark", "inversion", "watermark", "data"} <= kept
    assert "USER ringmark" in dockerfile and '".[serve]"' in dockerfile
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
