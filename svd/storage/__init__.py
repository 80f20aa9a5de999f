"""Files on this machine, objects in S3 and files on web servers behind one interface.

A location is a path, a `file://` URI, `s3://bucket/key`, or for reading an http(s) address. Endpoint and
credentials of S3 come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_REGION`). For example:

    from svd import storage

    for entry in storage.list_files("s3://videos/raw"):
        storage.download(entry.location, Path("raw") / entry.relative)

Another kind of storage is one file and one row of a table; see svd/storage/backend.py.
"""

from svd.core.files import sha256 as sha256
from svd.storage.backend import Conflict as Conflict
from svd.storage.backend import Entry as Entry
from svd.storage.backend import Location as Location
from svd.storage.backend import Truncated as Truncated
from svd.storage.backend import is_known as is_known
from svd.storage.backend import split_uri as split_uri
from svd.storage.files import RangedReader as RangedReader
from svd.storage.files import copy as copy
from svd.storage.files import delete as delete
from svd.storage.files import download as download
from svd.storage.files import exists as exists
from svd.storage.files import file_name as file_name
from svd.storage.files import is_address as is_address
from svd.storage.files import is_remote as is_remote
from svd.storage.files import join as join
from svd.storage.files import link as link
from svd.storage.files import list_files as list_files
from svd.storage.files import open_read as open_read
from svd.storage.files import ranges as ranges
from svd.storage.files import read_bytes as read_bytes
from svd.storage.files import read_range as read_range
from svd.storage.files import replace as replace
from svd.storage.files import sibling as sibling
from svd.storage.files import size as size
from svd.storage.files import stored_sha256 as stored_sha256
from svd.storage.files import upload as upload
from svd.storage.files import version as version
from svd.storage.files import write_bytes as write_bytes
from svd.storage.local import local_path as local_path
