"""What the server process that a comparison's cells are forked from loads: the libraries that each cell needs, quietly.

It stands outside the package, because importing that loads the libraries, which speak as they are loaded.
"""

from _pica_entry import quiet_imports

quiet_imports()
import pica.experiments.train.run  # noqa: E402, F401 -- after they are quiet; loading it is what this module is for
