"""Kinds of files by their suffixes: what is a video, what lies beside videos, and what isn't taken."""

from __future__ import annotations

VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts"),
    *(".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".ogm", ".3gp", ".3g2", ".mxf", ".dv", ".rm", ".rmvb"),
}
# Everything else that lies in a folder of videos is taken for a video, so that a broken one gets its row.
NOT_VIDEOS = {
    *(".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xml", ".html", ".srt", ".vtt"),
    *(".ass", ".nfo", ".sha256", ".md5", ".log", ".py", ".dvc", ".pdf", ".lock", ".part", ".tmp"),
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npz", ".npy", ".wav", ".flac"),
}
# What may show motion or hold videos and isn't taken has a row that says so.
_ANIMATION = "animated images are not taken; convert it to a video"
_ARCHIVE = "archives of this kind are not read; unpack it, or give a .tar"
_NOT_TAKEN = {
    **dict.fromkeys((".gif", ".apng"), _ANIMATION),
    **dict.fromkeys((".zip", ".gz", ".rar", ".7z"), _ARCHIVE),
}
LISTS_IN_FOLDERS = (".csv", ".jsonl", ".parquet")  # a .txt there is more often a licence than a list


def why_not(suffix: str) -> str:
    """Return why files with this suffix are not taken, for a row of the catalogue; empty for all others."""
    return f"a {suffix} file: {reason}" if (reason := _NOT_TAKEN.get(suffix)) else ""
