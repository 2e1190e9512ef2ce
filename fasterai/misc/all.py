"The same as `fasterai.all`: `from fasterai.misc.all import *`"
from fasterai.all import *
