"""Fixtures for every test module: one of each server for the whole of the suite."""

from servers import redis_server, s3_credentials, s3_server

__all__ = ["redis_server", "s3_credentials", "s3_server"]
