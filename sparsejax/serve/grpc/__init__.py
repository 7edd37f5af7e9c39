"""The gRPC server and its client. Needs the extra ``serve``."""
