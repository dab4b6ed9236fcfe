"""What the server process that a comparison's cells are forked from loads: the libraries that each cell needs, quietly.

It stands outside the package, because importing that loads the libraries, which speak as they are loaded.
"""

import gc

from _pica_entry import quiet_imports

quiet_imports()
import pica.experiments.train.run  # noqa: E402, F401 -- after they are quiet; loading it is what this module is for

# A cell's trainer collects garbage. It would look at half a million objects of the libraries each time, for a quarter of a
# second, and so copy the memory that they lie in.
gc.freeze()
