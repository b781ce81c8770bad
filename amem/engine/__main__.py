"""`python -m amem.engine --fd N`: the engine process, started by the HTTP process."""

from amem.engine.process import main

raise SystemExit(main())
