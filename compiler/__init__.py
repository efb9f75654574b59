"""The compiler: program, dialect, canonical form, pass contract, recipe, driver, report and command line.

It knows neither passes nor runtimes; they register themselves (see `registry`). Importing this package
imports nothing heavy, so that loading an artefact needs no torch.
"""
