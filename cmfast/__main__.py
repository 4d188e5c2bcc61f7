from cmfast.cli import main

raise SystemExit(main())
