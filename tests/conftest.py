"""Makes the helpers of this folder importable from every test: pytest puts the folder of a conftest.py on the path."""

from s3_fixtures import bucket, s3_server

__all__ = ["bucket", "s3_server"]
