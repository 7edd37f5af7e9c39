"""The deployment files, without a cluster: they parse, name each other rightly, and start a server that exists."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("prometheus_client")

from sparsejax.cli import options  # noqa: E402
from sparsejax.cli.main import command_parser  # noqa: E402
from sparsejax.engine.params import SamplingParams  # noqa: E402
from sparsejax.serve.admission import ServiceLimits  # noqa: E402
from sparsejax.serve.grpc.options import GrpcOptions  # noqa: E402
from sparsejax.serve.metrics import Metrics  # noqa: E402
from sparsejax.serve.openai.options import HttpOptions  # noqa: E402
from tests.serve.tiny import tiny_service  # noqa: E402

DEPLOY = Path(__file__).resolve().parents[2] / "scripts" / "deploy"
REQUIRED = {
    "Deployment": ("apps/v1", ("selector", "template", "replicas")),
    "Service": ("v1", ("selector", "ports")),
    "PersistentVolumeClaim": ("v1", ("accessModes", "resources")),
    "HorizontalPodAutoscaler": ("autoscaling/v2", ("scaleTargetRef", "maxReplicas", "metrics")),
}
OBJECTS = [
    one
    for name in ("storage", "http", "grpc")
    for one in yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
]
DEPLOYMENTS = {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == "Deployment"}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of everything that a server exports after a request."""

    async def scrape() -> bytes:
        service = tiny_service()
        service.start()
        await service.loaded()
        await (await service.submit([1, 2, 3], SamplingParams(max_tokens=4))).final()
        service.rejected["overloaded"] += 1
        text, _ = Metrics(service, "tiny").render()
        await service.stop()
        return text

    lines = asyncio.run(scrape()).decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def test_objects_have_what_they_need():
    for one in OBJECTS:
        version, fields = REQUIRED[one["kind"]]
        assert one["apiVersion"] == version and set(fields) <= set(one["spec"]), one["metadata"]["name"]
    names = [(one["kind"], one["metadata"]["name"]) for one in OBJECTS]
    assert len(set(names)) == len(names) and set(DEPLOYMENTS) == {"sparsejax", "sparsejax-grpc"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_fits_itself_and_its_service(name):
    spec = DEPLOYMENTS[name]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    claims = {one["metadata"]["name"] for one in OBJECTS if one["kind"] == "PersistentVolumeClaim"}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    used = {one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "persistentVolumeClaim" in one}
    assert used == claims
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        (action,) = {"httpGet", "grpc", "tcpSocket"} & set(container[kind])
        assert container[kind][action]["port"] in {*ports, *ports.values()}
    (service,) = [one for one in OBJECTS if one["kind"] == "Service" and one["metadata"]["name"] == name]
    assert service["spec"]["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)


@pytest.mark.parametrize(("name", "settings"), [("sparsejax", HttpOptions), ("sparsejax-grpc", GrpcOptions)])
def test_the_container_starts_a_server_that_exists(name, settings):
    pod = DEPLOYMENTS[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, *flags = container["args"]
    args = command_parser(command).parse_args(flags)
    server = settings(**options.given(args, settings))
    ServiceLimits(**options.given(args, ServiceLimits))
    config = options.make_config(args)
    assert server.port == container["ports"][0]["containerPort"] and server.host == "0.0.0.0"
    mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    assert config.model.startswith(mounts) and config.compile_cache_dir.startswith(mounts)
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + server.shutdown_timeout


def test_the_autoscaler_reads_a_metric_that_exists(exported):
    (scaler,) = [one for one in OBJECTS if one["kind"] == "HorizontalPodAutoscaler"]
    assert scaler["spec"]["scaleTargetRef"]["name"] in DEPLOYMENTS
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.search(r'__name__="([^"]+)"', rule["seriesQuery"])[1] in exported


def test_the_dashboard_shows_metrics_that_exist(exported):
    board = json.loads((DEPLOY / "grafana.json").read_text())
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]}) >= 8
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"sparsejax:\w+", target["expr"]))
            assert names and names <= exported, (panel["title"], names - exported)
            assert target["expr"].count("(") == target["expr"].count(")")


def test_the_image_copies_what_the_package_needs():
    text = (DEPLOY / "Dockerfile").read_text()
    root = DEPLOY.parents[1]
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((root / name).exists() for name in line.split()), line
    assert 'ENTRYPOINT ["sparsejax"]' in text and "USER 10001" in text


@pytest.mark.clients
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_manifests_fit_the_schemas_of_kubernetes(version):
    """Against the API's own JSON schemas, which the package brings along; fields nobody knows are errors."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="it is in the extra clients: make test-clients")
    for one in OBJECTS:
        kubernetes.validate(one, version, strict=True)
    spoiled = json.loads(json.dumps(DEPLOYMENTS["sparsejax"]))
    spoiled["spec"]["template"]["spec"]["containers"][0]["port"] = 1
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(spoiled, version, strict=True)
