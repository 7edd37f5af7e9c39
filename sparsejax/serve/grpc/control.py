"""`sparsejax.v1.Control`: what the server is, what it holds and what it has done."""

from __future__ import annotations

import time

import grpc

import sparsejax
from sparsejax.serve.grpc.protos import control_pb2 as pb
from sparsejax.serve.grpc.protos.control_pb2_grpc import ControlServicer
from sparsejax.serve.service import Service

Context = grpc.aio.ServicerContext


class Control(ControlServicer):
    """Reads; changes nothing."""

    def __init__(self, service: Service, names: tuple[str, ...], services: tuple[str, ...]):
        self._service, self._names, self._services = service, names, services

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        engine = self._service.engine.engine
        config = engine.model_config
        tokenizer = engine.tokenizer
        return pb.GetModelInfoResponse(
            names=self._names,
            source=self._service.config.model or "",
            family=config.family,
            vocab_size=config.vocab_size,
            max_model_len=engine.max_model_len,
            eos_token_ids=config.eos_token_ids,
            has_tokenizer=tokenizer is not None,
            has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        service = self._service
        return pb.GetServerInfoResponse(
            version=sparsejax.__version__,
            status=pb.ServerStatus.Value(f"SERVER_STATUS_{service.status.name}"),
            alive=service.alive,
            uptime_seconds=time.time() - service.created,
            admitted_requests=service.admission.requests,
            max_requests=service.limits.max_requests,
            services=self._services,
        )

    async def GetMemory(self, request: pb.GetMemoryRequest, context: Context) -> pb.GetMemoryResponse:
        return pb.GetMemoryResponse(bytes=self._service.engine.memory())

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        return pb.GetStatsResponse(values=self._service.engine.stats())
