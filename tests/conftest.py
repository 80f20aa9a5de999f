"""Makes the helpers of this folder importable from every test: pytest puts the folder of a conftest.py on the path."""
