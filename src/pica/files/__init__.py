"""Files and folders: written whole or not at all, claimed by one process, read with care."""
