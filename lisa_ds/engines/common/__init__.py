"""What every engine needs of a LISA run and no framework knows: draws, who trains when, where backward may stop."""
