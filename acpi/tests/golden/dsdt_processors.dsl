DefinitionBlock ("", "DSDT", 2, "DORMSE", "DORMOUSE", 0x00000001)
{
    Scope (\_SB)
    {
        Device (MBRD)
        {
            Name (_HID, EisaId ("PNP0C02") /* PNP Motherboard Resources */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                Memory32Fixed (ReadWrite,
                    0xE0000000,         // Address Base
                    0x10000000,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED10000,         // Address Base
                    0x00001000,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED20000,         // Address Base
                    0x00000010,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED30000,         // Address Base
                    0x00000001,         // Address Length
                    )
                IO (Decode16,
                    0x0600,             // Range Minimum
                    0x0600,             // Range Maximum
                    0x01,               // Alignment
                    0x04,               // Length
                    )
                IO (Decode16,
                    0x0604,             // Range Minimum
                    0x0604,             // Range Maximum
                    0x01,               // Alignment
                    0x02,               // Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED50000,         // Address Base
                    0x00000068,         // Address Length
                    )
            })
        }

        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A08") /* PCI Express Bus */)  // _HID: Hardware ID
            Name (_CID, EisaId ("PNP0A03") /* PCI Bus */)  // _CID: Compatible ID
            Name (_SEG, Zero)  // _SEG: PCI Segment
            Name (_BBN, Zero)  // _BBN: BIOS Bus Number
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CBA, 0xE0000000)  // _CBA: Configuration Base Address
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0x0000,             // Granularity
                    0x0000,             // Range Minimum
                    0x00FF,             // Range Maximum
                    0x0000,             // Translation Offset
                    0x0100,             // Length
                    ,, )
                IO (Decode16,
                    0x0CF8,             // Range Minimum
                    0x0CF8,             // Range Maximum
                    0x01,               // Alignment
                    0x08,               // Length
                    )
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
                    0x0000,             // Granularity
                    0x1000,             // Range Minimum
                    0xFFFF,             // Range Maximum
                    0x0000,             // Translation Offset
                    0xF000,             // Length
                    ,, , TypeStatic, DenseTranslation)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x00000000,         // Granularity
                    0xC0000000,         // Range Minimum
                    0xDFFFFFFF,         // Range Maximum
                    0x00000000,         // Translation Offset
                    0x20000000,         // Length
                    ,, , AddressRangeMemory, TypeStatic)
                QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x0000000000000000, // Granularity
                    0x0000008000000000, // Range Minimum
                    0x000000EFFFFFFFFF, // Range Maximum
                    0x0000000000000000, // Translation Offset
                    0x0000007000000000, // Length
                    ,, , AddressRangeMemory, TypeStatic)
            })
            Method (_OSC, 4, Serialized)  // _OSC: Operating System Capabilities
            {
                CreateDWordField (Arg3, Zero, CDW1)
                If ((Arg0 == ToUUID ("33db4d5b-1ff7-401c-9657-7441c03dd766") /* PCI Host Bridge Device */))
                {
                    If ((Arg1 != One))
                    {
                        CDW1 |= 0x08
                    }

                    If ((Arg2 >= 0x03))
                    {
                        CreateDWordField (Arg3, 0x08, CDW3)
                        Local0 = (CDW3 & 0x15)
                        If ((Local0 != CDW3))
                        {
                            CDW1 |= 0x10
                        }

                        CDW3 = Local0
                    }
                }
                Else
                {
                    CDW1 |= 0x04
                }

                Return (Arg3)
            }

            Name (_PRT, Package (0x00) {})  // _PRT: PCI Routing Table
            Method (PDSM, 3, NotSerialized)
            {
                If ((Arg0 == ToUUID ("e5c937d0-3553-4d7a-9117-ea4d19c3434d") /* Device Labeling Interface */))
                {
                    If ((Arg2 == Zero))
                    {
                        Return (Buffer (0x02)
                        {
                             0x01, 0x02                                       // ..
                        })
                    }

                    If ((Arg2 == 0x09))
                    {
                        If ((Arg1 >= 0x03))
                        {
                            Return (Package (0x05)
                            {
                                Zero, 
                                Zero, 
                                Zero, 
                                Zero, 
                                Zero
                            })
                        }
                    }
                }

                Return (Buffer (One)
                {
                     0x00                                             // .
                })
            }
        }

        Device (PWRB)
        {
            Name (_HID, EisaId ("PNP0C0C") /* Power Button Device */)  // _HID: Hardware ID
        }

        Device (GED)
        {
            Name (_HID, "ACPI0013" /* Generic Event Device */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )
                {
                    0x0000000A,
                }
            })
            OperationRegion (EREG, SystemMemory, 0xFED20000, 0x10)
            Field (EREG, DWordAcc, NoLock, WriteAsZeros)
            {
                EVTS,   32, 
                ADDD,   32, 
                LEAV,   32, 
                RLSD,   32
            }

            OperationRegion (WREG, SystemMemory, 0xFED10010, 0x20)
            Field (WREG, DWordAcc, NoLock, WriteAsZeros)
            {
                WAK0,   32, 
                WAK1,   32, 
                WAK2,   32, 
                WAK3,   32, 
                WAK4,   32, 
                WAK5,   32, 
                WAK6,   32, 
                WAK7,   32
            }

            Method (_EVT, 1, Serialized)  // _EVT: Event
            {
                Local0 = EVTS /* \_SB_.GED_.EVTS */
                If ((Local0 & One))
                {
                    Notify (\_SB.PWRB, 0x80) // Status Change
                }

                If ((Local0 & 0x02)) {}
                If ((Local0 & 0x10))
                {
                    PSCN ()
                }
            }
        }

        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501") /* 16550A-compatible COM Serial Port */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                IO (Decode16,
                    0x03F8,             // Range Minimum
                    0x03F8,             // Range Maximum
                    0x01,               // Alignment
                    0x08,               // Length
                    )
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )
                {
                    0x00000004,
                }
            })
        }

        Device (RTC)
        {
            Name (_HID, EisaId ("PNP0B00") /* AT Real-Time Clock */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                IO (Decode16,
                    0x0070,             // Range Minimum
                    0x0070,             // Range Maximum
                    0x01,               // Alignment
                    0x02,               // Length
                    )
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )
                {
                    0x00000008,
                }
            })
        }

        OperationRegion (PREG, SystemMemory, 0xFED50000, 0x68)
        Field (PREG, DWordAcc, NoLock, WriteAsZeros)
        {
            PPR0,   32, 
            PPR1,   32, 
            PPR2,   32, 
            PPR3,   32, 
            PPR4,   32, 
            PPR5,   32, 
            PPR6,   32, 
            PPR7,   32, 
            PAD0,   32, 
            PAD1,   32, 
            PAD2,   32, 
            PAD3,   32, 
            PAD4,   32, 
            PAD5,   32, 
            PAD6,   32, 
            PAD7,   32, 
            PLV0,   32, 
            PLV1,   32, 
            PLV2,   32, 
            PLV3,   32, 
            PLV4,   32, 
            PLV5,   32, 
            PLV6,   32, 
            PLV7,   32, 
            PEJT,   32, 
            PSTS,   32
        }

        Method (PRPT, 3, Serialized)
        {
            Local0 = ((Arg1 & 0xFF) << 0x08)
            Local1 = ((Arg2 & 0xFF) << 0x10)
            Local0 |= Local1
            PSTS = (Local0 | Arg0)
        }

        Method (PSCN, 0, Serialized)
        {
            Local0 = PAD0 /* \_SB_.PAD0 */
            If ((Local0 & One))
            {
                Notify (C000, One) // Device Check
            }

            If ((Local0 & 0x02))
            {
                Notify (C001, One) // Device Check
            }

            If ((Local0 & 0x04))
            {
                Notify (C002, One) // Device Check
            }

            If ((Local0 & 0x08))
            {
                Notify (C003, One) // Device Check
            }

            Local0 = PLV0 /* \_SB_.PLV0 */
            If ((Local0 & One))
            {
                Notify (C000, 0x03) // Eject Request
            }

            If ((Local0 & 0x02))
            {
                Notify (C001, 0x03) // Eject Request
            }

            If ((Local0 & 0x04))
            {
                Notify (C002, 0x03) // Eject Request
            }

            If ((Local0 & 0x08))
            {
                Notify (C003, 0x03) // Eject Request
            }
        }

        Device (C000)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Method (_STA, 0, NotSerialized)  // _STA: Status
            {
                If ((PPR0 & One))
                {
                    Return (0x0F)
                }

                Return (Zero)
            }

            Name (_MAT, Buffer (0x08)  // _MAT: Multiple APIC Table Entry
            {
                 0x00, 0x08, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00   // ........
            })
            Method (_OST, 3, Serialized)  // _OST: OSPM Status Indication
            {
                PRPT (Zero, Arg0, Arg1)
            }
        }

        Device (C001)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, One)  // _UID: Unique ID
            Method (_STA, 0, NotSerialized)  // _STA: Status
            {
                If ((PPR0 & 0x02))
                {
                    Return (0x0F)
                }

                Return (Zero)
            }

            Name (_MAT, Buffer (0x08)  // _MAT: Multiple APIC Table Entry
            {
                 0x00, 0x08, 0x01, 0x01, 0x01, 0x00, 0x00, 0x00   // ........
            })
            Method (_EJ0, 1, Serialized)  // _EJx: Eject Device, x=0-9
            {
                PEJT = One
            }

            Method (_OST, 3, Serialized)  // _OST: OSPM Status Indication
            {
                PRPT (One, Arg0, Arg1)
            }
        }

        Device (C002)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, 0x02)  // _UID: Unique ID
            Method (_STA, 0, NotSerialized)  // _STA: Status
            {
                If ((PPR0 & 0x04))
                {
                    Return (0x0F)
                }

                Return (Zero)
            }

            Name (_MAT, Buffer (0x08)  // _MAT: Multiple APIC Table Entry
            {
                 0x00, 0x08, 0x02, 0x02, 0x01, 0x00, 0x00, 0x00   // ........
            })
            Method (_EJ0, 1, Serialized)  // _EJx: Eject Device, x=0-9
            {
                PEJT = 0x02
            }

            Method (_OST, 3, Serialized)  // _OST: OSPM Status Indication
            {
                PRPT (0x02, Arg0, Arg1)
            }
        }

        Device (C003)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, 0x03)  // _UID: Unique ID
            Method (_STA, 0, NotSerialized)  // _STA: Status
            {
                If ((PPR0 & 0x08))
                {
                    Return (0x0F)
                }

                Return (Zero)
            }

            Name (_MAT, Buffer (0x08)  // _MAT: Multiple APIC Table Entry
            {
                 0x00, 0x08, 0x03, 0x03, 0x01, 0x00, 0x00, 0x00   // ........
            })
            Method (_EJ0, 1, Serialized)  // _EJx: Eject Device, x=0-9
            {
                PEJT = 0x03
            }

            Method (_OST, 3, Serialized)  // _OST: OSPM Status Indication
            {
                PRPT (0x03, Arg0, Arg1)
            }
        }
    }

    Name (\_S5, Package (0x04)  // _S5_: S5 System State
    {
        0x05, 
        0x05, 
        Zero, 
        Zero
    })
}
